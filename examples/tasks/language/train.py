"""Trains the language model, once: python -m examples.tasks.language.train."""

from ..training import main
from . import TASK

if __name__ == "__main__":
    main(TASK)
