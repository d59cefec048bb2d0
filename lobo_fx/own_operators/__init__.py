"""Operators of our own, one file a family, each with its fake, its gradient and its cost.

A graph calls them like ATen's; they survive `torch.export`, and an exporter writes each as operators of its format.
Their bodies are the reference that a file is compared with.
"""

from lobo_fx.own_operators import table  # noqa: F401  declares the operators
