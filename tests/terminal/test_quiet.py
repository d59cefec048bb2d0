"""What is silenced while libraries work comes back, in any number of threads."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx.errors import TraceError
from lobo_fx.passes import FoldBatchNorm
from lobo_fx.terminal.quiet import no_errors_printed


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


def state() -> tuple[object, ...]:
    """What of the process a compilation changes for a while."""
    streams, filters = (sys.stdout, sys.stderr), list(warnings.filters)
    return streams, filters, logging.root.manager.disable, torch.get_rng_state().tolist()


def test_threads_that_compile_at_once_succeed_and_leave_the_process_as_it_was() -> None:
    models = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval() for _ in range(4)]
    images = torch.randn(2, 3, 8, 8)
    before = state()

    def work(model: nn.Module) -> float:
        with pytest.raises(TraceError, match="data-dependent"):
            lobo_fx.trace(Branching(), images)
        return lobo_fx.compile(model, [FoldBatchNorm()], example_inputs=images, progress=False).report.rows[-1].snr

    with ThreadPoolExecutor(4) as pool:
        assert min(pool.map(work, models)) > 100
    assert state() == before


def test_other_threads_still_write_errors() -> None:
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream), no_errors_printed():
        print("of a library", file=sys.stderr)
        other = threading.Thread(target=lambda: print("of the user", file=sys.stderr))
        other.start()
        other.join()
    assert stream.getvalue() == "of the user\n"
