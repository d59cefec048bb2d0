"""Trains the demapper, once: python -m examples.tasks.receiver.train."""

from ..training import main
from . import TASK

if __name__ == "__main__":
    main(TASK)
