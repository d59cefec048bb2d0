"""The table of axis rules, one file a family. Each rule's docstring is its algebra."""

from lobo_fx.axes.rules import (  # noqa: F401  each fills the table
    attention,
    branches,
    contractions,
    convolutions,
    creation,
    cutting,
    distances,
    indexing,
    joining,
    norms,
    ordering,
    pointwise,
    recurrent,
    reductions,
    repeating,
    scattering,
    spatial,
    spectral,
    views,
)
