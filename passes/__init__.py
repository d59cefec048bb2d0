"""Rewrites, one idea a file: the manual for pass authors.

Settings are fields of frozen dataclasses; see each class.
"""

if not __name__.startswith("lobo_fx."):
    raise ImportError("import lobo_fx.passes, not passes: a module must exist only once")

from lobo_fx.passes.compute_in_float import ComputeInFloat
from lobo_fx.passes.equalize import EqualizeLayers, SmoothActivations
from lobo_fx.passes.fold_batch_norm import FoldBatchNorm
from lobo_fx.passes.fuse_attention import FuseAttention
from lobo_fx.passes.mixed_precision import MixedPrecision
from lobo_fx.passes.prune_channels import PruneChannels
from lobo_fx.passes.prune_weights import PruneWeights
from lobo_fx.passes.quantize_dynamic import QuantizeDynamic
from lobo_fx.passes.quantize_static import QuantizeStatic
from lobo_fx.passes.quantize_weights import QuantizeWeights

__all__ = [
    "ComputeInFloat",
    "EqualizeLayers",
    "FoldBatchNorm",
    "FuseAttention",
    "MixedPrecision",
    "PruneChannels",
    "PruneWeights",
    "QuantizeDynamic",
    "QuantizeStatic",
    "QuantizeWeights",
    "SmoothActivations",
]
