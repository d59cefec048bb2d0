"""What can't be traced is named for what it is, before any work; and torch's own advice is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.export import Dim

from lobo_fx.capture.tracing import trace
from lobo_fx.errors import InvalidInput, TraceError
from lobo_fx.graph.provenance import user_line

ROWS = torch.randn(2, 8)


class Apart(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(8, 4)})
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.parts[self.name](x)
        return found


def scripted() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Sequential(nn.Linear(8, 4))))


def quantized() -> nn.Module:
    made: nn.Module = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
        nn.Sequential(nn.Linear(8, 4)), {nn.Linear}
    )
    return made


def frozen() -> nn.Module:
    with torch.inference_mode():
        return nn.Sequential(nn.Linear(8, 4))


@pytest.mark.filterwarnings("ignore")  # of torch, that scripting and quantizing so are of the past
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (scripted, "module '1' is scripted"),
        (quantized, "module '0' is quantized already"),
        (frozen, "'0.weight' was made under torch.inference_mode"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), "'0.weight' has no shape yet"),
        (lambda: Apart("lambda"), "'parts.lambda' holds a word that Python keeps for itself"),
    ],
)
def test_what_can_not_be_traced_is_named(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        trace(make(), ROWS)


def test_a_name_that_only_holds_a_word_of_python_traces() -> None:
    assert trace(Apart("lambdas"), ROWS).module(ROWS).shape == (2, 4)


def test_an_input_called_by_a_word_of_python_is_refused() -> None:
    class Anything(nn.Module):
        def forward(self, **kwargs: torch.Tensor) -> torch.Tensor:
            return kwargs["in"] + 1

    with pytest.raises(InvalidInput, match="'in' holds a word that Python keeps for itself"):
        trace(Anything(), {"in": ROWS})


def test_what_torch_suggests_for_a_range_that_is_too_wide_is_kept() -> None:
    with pytest.raises(TraceError, match=r"Suggested fixes:\n  h = Dim\('h', min=3\)[\s\S]*or Dim\.AUTO"):
        trace(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8), {"input": {2: Dim("h")}})


def test_a_line_is_nobody_s_where_only_libraries_and_generated_code_were_at_work() -> None:
    frames = [f'  File "{file}", line 3, in forward\n    call()\n' for file in ("<eval_with_key>.7", torch.__file__)]
    assert user_line("".join(frames)) == ""
    assert user_line('  File "/home/net.py", line 3, in forward\n    call()\n' + frames[0]) == "/home/net.py:3: call()"


def test_a_single_row_can_not_be_free_and_the_message_says_so() -> None:
    free = {"input": {0: Dim("batch")}}
    with pytest.raises(TraceError, match=r"torch\.export fixes sizes of 0 and 1: .* give example inputs of at least 2"):
        trace(nn.Linear(8, 4), ROWS[:1], dynamic_shapes=free)
    assert "batch" in str(trace(nn.Linear(8, 4), ROWS, dynamic_shapes=free).signature)
