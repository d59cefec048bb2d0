"""Trains the models for glyphs, once: python -m examples.tasks.glyphs.train."""

from ..training import main
from . import TASK

if __name__ == "__main__":
    main(TASK)
