"""Networks whose trained weights come inside a package: a file gives all that measuring one needs."""

from lobo_fx import sources

from .network import Network

__all__ = ["Network"]

sources.declare_torchvision_operators()  # before torchvision is imported, by transformers too
