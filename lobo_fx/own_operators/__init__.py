"""Operators of our own, one file per family, each with its fake, its gradient and its cost.

Graphs call them like ATen's. They survive `torch.export`, and an exporter writes each as operators of its format.
Their bodies are the reference that files are compared with.
"""

from lobo_fx.own_operators import table  # noqa: F401  declares the operators
