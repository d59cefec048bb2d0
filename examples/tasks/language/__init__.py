"""Characters of Python: a decoder-only language model of the text of Python's own standard library."""

from ..training import Task
from .models import MODELS
from .score import character_loss, negative_bits
from .text import load

TASK = Task("language", load, MODELS, character_loss, negative_bits, "bits per character, negative", held_out=512)
