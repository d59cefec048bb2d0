"""A complete pass of your own: SiLU becomes hard-swish, which CPUs compute without an exponential."""

import dataclasses

import torch

import lobo_fx
from lobo_fx.graph.operators import aten
from lobo_fx.graph.rewriting import Match, Op, rewrite
from lobo_fx.plugins.registry import PASSES


@dataclasses.dataclass(frozen=True)
class ReplaceSilu(lobo_fx.Pass):
    """`silu(x)` → `hardswish(x)`."""

    promise = lobo_fx.Promise.APPROXIMATE  # outputs move: the compiler reports by how many decibels

    def run(self, program: lobo_fx.Program, context: lobo_fx.Context) -> lobo_fx.Program:
        def replace(match: Match) -> torch.fx.Node:
            return program.graph.call_function(aten.hardswish.default, (match.arguments("silu")["self"],))

        rewrite(program, Op(aten.silu.default, name="silu"), replace)
        return program


def main() -> None:
    """Registers the pass and compiles with it by name; a package would use the entry point `lobo_fx.passes`."""
    PASSES.register("replace_silu", ReplaceSilu)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 4))
    print(lobo_fx.compile(model, ["replace_silu"], example_inputs=torch.randn(2, 8)))


if __name__ == "__main__":
    main()
