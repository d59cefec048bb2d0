"""Test kit for number formats of few bits."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lobo_fx.own_operators.formats import FORMATS, Format, pack, unpack
from lobo_fx.plugins.registry import PASSES
from lobo_fx.result import load
from lobo_fx.testing.passes import check_pass

__all__ = ["check_number_format"]


def check_number_format(number: Format) -> None:
    """Encodes, packs, quantizes, exports, saves and loads.

    Asserts: codes survive decoding and encoding; zero stays zero; a value is rounded to the nearest number, and
    clipped to the largest; packed rows of any length unpack to themselves; weights in this format compute the same in
    ONNX Runtime as in PyTorch, and when saved and loaded.

    Args:
        number: the format; if it is not registered, it is for the duration of the test.
    """
    _check_codes(number)
    for columns in range(1, 19):
        codes = torch.randint(2**number.bits, (3, columns), dtype=torch.uint8)
        assert torch.equal(unpack(pack(codes, number.bits), number.bits, columns), codes), f"{columns} don't unpack"
    known = number.name in FORMATS
    if not known:
        FORMATS.register(number.name, number)
    try:
        assert FORMATS[number.name] == number, f"another format is called '{number.name}'"
        _check_weights(number)
    finally:
        if not known:
            FORMATS.unregister(number.name)


def _check_codes(number: Format) -> None:
    assert float(number.decode(number.encode(torch.zeros(1)))[0]) == 0, "zero does not stay zero"
    if number.is_integer:
        values = np.arange(number.limits[0], number.limits[1] + 1, dtype=np.float32) - number.zero_point
    else:
        values = np.asarray(number.magnitudes, np.float32)
        values = np.concatenate([-values[:0:-1], values])
    decoded = number.decode(number.encode(torch.from_numpy(values))).numpy()
    np.testing.assert_array_equal(decoded, values, "a number of the format is not its own nearest")
    random = np.random.default_rng(0).uniform(1.2 * values.min(), 1.2 * values.max(), 5000).astype(np.float32)
    found = number.decode(number.encode(torch.from_numpy(random))).numpy()
    nearest = np.abs(random[:, None] - values[None, :]).min(1)
    np.testing.assert_allclose(np.abs(found - random), nearest, rtol=1e-5, atol=1e-6, err_msg="not the nearest")


def _check_weights(number: Format) -> None:
    """Tests linear layers, a convolution and an embedding; the export compares files with PyTorch."""
    model = nn.Sequential(
        nn.Embedding(40, 33), nn.Linear(33, 24), nn.ReLU(), nn.Conv1d(5, 24, 3), nn.Flatten(), nn.Linear(528, 16)
    ).eval()
    rows = torch.arange(10).view(2, 5)
    for block_size in (16, None):
        quantize = PASSES.ours("quantize_weights")(number.name, block_size, method="round", compute="float32")
        result = check_pass(quantize, model, rows, export=True)
        before, after = (result.report.rows[at] for at in (0, -1))
        assert after.bytes < before.bytes, "weights did not get smaller"
        with tempfile.TemporaryDirectory() as folder:
            twin = load(result.save(Path(folder) / "saved"))
        assert torch.equal(twin.module(rows), result.module(rows)), "a saved program computes something else"
