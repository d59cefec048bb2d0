"""A neural demapper: bits of 16-QAM symbols from what came over a Rayleigh fading channel, and its pilots."""

from ..training import Task
from .channel import load
from .models import MODELS
from .score import bit_accuracy, bit_loss

TASK = Task("receiver", load, MODELS, bit_loss, bit_accuracy, "share of right bits")
