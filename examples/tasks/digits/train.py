"""Trains the models for digits, once: python -m examples.tasks.digits.train."""

from ..training import main
from . import TASK

if __name__ == "__main__":
    main(TASK)
