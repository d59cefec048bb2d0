"""Characters in the fonts that come with matplotlib: 28×28 images, 36 classes, fonts of their own for the test."""

from ..training import Task
from .data import load
from .models import MODELS

TASK = Task("glyphs", load, MODELS)
