"""Metadata of an exported file: what was done, with which settings, to which weights, on which data, when."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lobo_fx.contracts.passbase import Pass, shown
from lobo_fx.contracts.pipeline import Pipeline
from lobo_fx.errors import InvalidInput, LoboError
from lobo_fx.plugins.registry import PASSES
from lobo_fx.report.report import Report
from lobo_fx.version import __version__

__all__ = ["all_settings", "file_facts"]


def file_facts(
    report: Report, pipeline: Pipeline | None, passes: Sequence[tuple[str, Mapping[str, Any]]], original: bool
) -> dict[str, str]:
    """Facts by name; of the original's file, without passes.

    Args:
        report: report of the compilation.
        pipeline: the pipeline that ran; None for a loaded result, whose original and data are not known.
        passes: name of every pass, and its settings that are not the default.
        original: whether the file is the original's.
    """
    done = [] if original else passes
    settings = [(name, all_settings(name, given)) for name, given in done]
    facts = {
        "version": __version__,
        "model": report.model,
        "passes": json.dumps(done, default=shown),
        "settings": json.dumps(settings, default=shown),
        "date": _date(),
        "machine": report.machine,
    }
    facts |= {} if report.seed is None else {"seed": str(report.seed)}
    if pipeline is not None:
        facts["source_checksum"] = pipeline.source_checksum
        if rows := pipeline.context.split.held_out:
            facts["calibration_rows_read"] = str(len(rows))
            facts["calibration_checksum"] = hashlib.sha256(b"".join(sorted(rows))).hexdigest()[:16]
    if report.rows:
        row = report.rows[0 if original else -1]
        facts |= {} if row.score is None else {"score": f"{row.score:.6g}"}
        facts |= {"decibels": f"{row.snr:.2f}"} if math.isfinite(row.snr) else {}
    return {f"lobo_fx.{name}": value for name, value in facts.items()} | {"torch.version": str(torch.__version__)}


def all_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a pass, also those at their defaults; the given ones if it is no longer registered."""
    try:
        made: Pass = PASSES.get(name)(**given)
    except (LoboError, TypeError):
        return dict(given)
    return made.all_settings


def _date() -> str:
    """Today in UTC, or the day of SOURCE_DATE_EPOCH, for reproducible builds.

    Raises:
        InvalidInput: SOURCE_DATE_EPOCH is no time.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    zone = datetime.UTC
    try:
        day = datetime.datetime.fromtimestamp(int(epoch), zone) if epoch else datetime.datetime.now(zone)
    except (ValueError, OverflowError, OSError):
        raise InvalidInput(f"SOURCE_DATE_EPOCH is {epoch!r}; it must be a whole number of seconds since 1970") from None
    return day.date().isoformat()
