"""Rewrites, one idea a file: the manual for pass authors.

Settings are fields of frozen dataclasses; see each class.
"""

if not __name__.startswith("lobo_fx."):
    raise ImportError("import lobo_fx.passes, not passes: a module must exist only once")

from lobo_fx.passes.fusion.fold_batch_norm import FoldBatchNorm
from lobo_fx.passes.fusion.fold_weights import FoldWeights
from lobo_fx.passes.fusion.fuse_attention import FuseAttention
from lobo_fx.passes.goal.fit_goal import FitGoal
from lobo_fx.passes.goal.plan import GoalPlan
from lobo_fx.passes.low_rank.factorize import Factorize
from lobo_fx.passes.pruning.plan import PruningPlan
from lobo_fx.passes.pruning.prune_channels import PruneChannels
from lobo_fx.passes.pruning.prune_weights import PruneWeights
from lobo_fx.passes.quantization.compute_in_float import ComputeInFloat
from lobo_fx.passes.quantization.equalize import EqualizeLayers
from lobo_fx.passes.quantization.mixed_precision import MixedPrecision
from lobo_fx.passes.quantization.quantize_dynamic import QuantizeDynamic
from lobo_fx.passes.quantization.quantize_static import QuantizeStatic
from lobo_fx.passes.quantization.quantize_weights import QuantizeWeights
from lobo_fx.passes.quantization.smooth import SmoothActivations
from lobo_fx.passes.training.distill import Distill
from lobo_fx.passes.training.fine_tune import FineTune
from lobo_fx.passes.training.iterative_prune import IterativePrune
from lobo_fx.passes.training.quantization_aware import QuantizationAwareTraining
from lobo_fx.passes.training.sparse_training import SparseTraining
from lobo_fx.passes.training.student import Student

__all__ = [
    "ComputeInFloat",
    "Distill",
    "EqualizeLayers",
    "Factorize",
    "FineTune",
    "FitGoal",
    "FoldBatchNorm",
    "FoldWeights",
    "FuseAttention",
    "GoalPlan",
    "IterativePrune",
    "MixedPrecision",
    "PruneChannels",
    "PruneWeights",
    "PruningPlan",
    "QuantizationAwareTraining",
    "QuantizeDynamic",
    "QuantizeStatic",
    "QuantizeWeights",
    "SmoothActivations",
    "SparseTraining",
    "Student",
]
