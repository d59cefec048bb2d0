"""The text: the modules of Python's standard library, as they lie beside the interpreter that runs."""

from __future__ import annotations

import string
import sysconfig
from pathlib import Path

import torch

from ..training import Split

CHARACTERS = string.printable
UNKNOWN = len(CHARACTERS)
VOCABULARY = UNKNOWN + 1
CONTEXT = 128
TEST_SHARE = 20
"""Every twentieth module is for testing; no part of it is seen in training."""
_CODES = {character: code for code, character in enumerate(CHARACTERS)}


def modules() -> list[Path]:
    """The modules at the top of the standard library, by name."""
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def encode(text: str) -> torch.Tensor:
    """Codes of characters."""
    return torch.tensor([_CODES.get(character, UNKNOWN) for character in text])


def decode(codes: torch.Tensor) -> str:
    """Characters of codes; unknown ones as question marks."""
    return "".join(CHARACTERS[code] if code < UNKNOWN else "?" for code in codes.tolist())


def load(cache: Path) -> tuple[Split, Split]:
    """Training and test split: windows of `CONTEXT` characters, and the same a character later."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in modules()]
    test = "".join(text for index, text in enumerate(texts) if index % TEST_SHARE == 0)
    train = "".join(text for index, text in enumerate(texts) if index % TEST_SHARE)
    return _windows(train), _windows(test)


def _windows(text: str) -> Split:
    codes = encode(text)
    count = (len(codes) - 1) // CONTEXT
    return Split(codes[: count * CONTEXT].view(count, CONTEXT), codes[1 : count * CONTEXT + 1].view(count, CONTEXT))
