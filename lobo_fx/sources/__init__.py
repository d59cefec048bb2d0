"""Sources of models, weights and data."""

from lobo_fx.sources.torchvision_operators import declare_torchvision_operators

__all__ = ["declare_torchvision_operators"]
