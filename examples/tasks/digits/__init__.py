"""scikit-learn's handwritten digits: 8×8 images, 10 classes; trains in seconds."""

from ..training import Task
from .data import load
from .models import MODELS

TASK = Task("digits", load, MODELS)
