"""Small real tasks that train on a CPU in minutes, to see what passes do to accuracy.

python -m examples.tasks.digits.train
python -m examples.tasks.glyphs.train
python -m examples.tasks.receiver.train
python -m examples.tasks.language.train
"""

from .training import Recipe, Split, Task, accuracy

__all__ = ["Recipe", "Split", "Task", "accuracy"]
