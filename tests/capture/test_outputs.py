"""Outputs that are kept: the rest goes with what it took, containers stay what they are, wrong names are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx import InvalidInput, Program
from lobo_fx.capture.outputs import keep_outputs
from lobo_fx.capture.tracing import trace
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
from lobo_fx.passes import PruneChannels

ModelOutput = pytest.importorskip("transformers.utils").ModelOutput


class Pair(NamedTuple):
    low: Any
    high: Any


@dataclasses.dataclass
class Found(ModelOutput):  # type: ignore[misc, valid-type]
    scores: torch.Tensor
    states: tuple[torch.Tensor, ...] | None = None


class Several(nn.Module):
    """Outputs in every container."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.extra = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
        self.calls.add_(1)  # type: ignore[operator]
        hidden = self.body(x).relu()
        states = Pair(hidden, hidden + 1)
        return {
            "logits": self.head(hidden),
            "parts": (self.extra(y), [states, y * 2]),
            "found": Found(scores=x + 1, states=(x + 2, x + 3)),
            "number": 3,
        }


INPUTS = (torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4))


@pytest.fixture(scope="module")
def traced() -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    model = Several().eval()
    return model, trace(model, INPUTS)


def names(program: Program) -> list[str]:
    return [spec.name for spec in program.signature.outputs if spec is not None]


def parameters(program: Program) -> list[str]:
    return [name for name, _ in program.module.named_parameters()]


def test_a_dict_keeps_the_chosen_entries_alone(traced: tuple[nn.Module, Program]) -> None:
    model, program = traced
    kept = keep_outputs(program, "logits")
    found = kept.module(*INPUTS)
    assert found.keys() == {"logits"}
    torch.testing.assert_close(found["logits"], model(*INPUTS)["logits"], rtol=0, atol=0)
    assert names(kept) == ["logits"]


def test_a_tuple_a_list_and_a_named_tuple_keep_their_places(traced: tuple[nn.Module, Program]) -> None:
    model, program = traced
    kept = keep_outputs(program, ["parts.1.0.high"])
    found, expected = kept.module(*INPUTS), model(*INPUTS)
    assert found.keys() == {"parts"}
    assert found["parts"][0] is None
    assert isinstance(found["parts"][1], list)
    assert isinstance(found["parts"][1][0], Pair)
    assert found["parts"][1][0].low is None
    assert found["parts"][1][1] is None
    torch.testing.assert_close(found["parts"][1][0].high, expected["parts"][1][0].high, rtol=0, atol=0)
    assert names(kept) == ["parts.1.0.high"]


def test_a_container_stands_for_all_that_it_holds(traced: tuple[nn.Module, Program]) -> None:
    _, program = traced
    kept = keep_outputs(program, ["found", "logits"])
    assert names(kept) == ["logits", "found.scores", "found.states.0", "found.states.1"]
    assert isinstance(kept.module(*INPUTS)["found"], Found)
    assert names(keep_outputs(program, ["found.states", "found.scores"])) == names(kept)[1:]
    everything = keep_outputs(program, ["logits", "parts", "found"])
    assert names(everything) == names(program)


def test_nothing_is_computed_for_what_is_gone(traced: tuple[nn.Module, Program]) -> None:
    """The twin that keeps everything keeps every parameter; the program that was given stays whole."""
    _, program = traced
    assert parameters(keep_outputs(program, "logits")) == ["body.weight", "body.bias", "head.weight", "head.bias"]
    kept = keep_outputs(program, "parts.0")
    assert parameters(kept) == ["extra.weight", "extra.bias"]
    assert not kept.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    assert len(parameters(keep_outputs(program, names(program)))) == len(parameters(program)) == 6
    assert len(names(program)) == 8


def test_what_the_model_writes_is_still_written(traced: tuple[nn.Module, Program]) -> None:
    _, program = traced
    module = keep_outputs(program, "logits").module
    before = module.get_buffer("calls").clone()
    module(*INPUTS)
    assert module.get_buffer("calls") == before + 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("logit", "the model has no output 'logit'; did you mean logits?"),
        (["logits", "parts.2"], r"no output 'parts\.2'; did you mean parts\.0"),
        ("part", "no output 'part'"),
        ("", "no output ''"),
        ([], r"outputs is \[\]; expected names of outputs: logits, parts\.0"),
        ([0], r"outputs is \[0\]; expected names"),
        (3, "outputs is 3; expected names"),
        ("number", "no output 'number'"),
    ],
)
def test_a_wrong_name_is_refused_and_near_ones_are_told(
    wrong: Any, words: str, traced: tuple[nn.Module, Program]
) -> None:
    with pytest.raises(InvalidInput, match=words):
        keep_outputs(traced[1], wrong)


def test_an_entry_that_its_type_asks_for_is_named(traced: tuple[nn.Module, Program]) -> None:
    with pytest.raises(InvalidInput, match=r"a Found can't hold states alone: .*'scores'; keep that output too"):
        keep_outputs(traced[1], "found.states.1")
    assert names(keep_outputs(traced[1], ["found.scores"])) == ["found.scores"]


class Tuple(nn.Module):
    """Its second output pins the hidden width."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.up(x).relu()
        return self.down(hidden), hidden


def test_outputs_are_chosen_before_any_pass_and_last_through_files(tmp_path: Path) -> None:
    model, x = Tuple(), torch.randn(3, 4)
    whole = lobo_fx.compile(model, [PruneChannels(0.5)], example_inputs=x, progress=False)
    result = lobo_fx.compile(model, [PruneChannels(0.5)], example_inputs=x, outputs="output_0", progress=False)
    assert whole.module.get_parameter("up.weight").shape == (16, 4)
    assert result.module.get_parameter("up.weight").shape == (8, 4)
    assert result.original is not None
    assert names(result.original) == ["output_0"]
    first, second = result.module(x)
    assert first.shape == (3, 2)
    assert second is None

    result.export(tmp_path / "model.onnx")
    session = OnnxRuntime().load(tmp_path / "model.onnx", threads=1)
    (array,) = session.run({"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(array), first.detach())
    result.save(tmp_path / "saved")
    loaded = lobo_fx.load(tmp_path / "saved")
    assert names(loaded.program) == ["output_0"]
    torch.testing.assert_close(loaded.module(x), (first, None), rtol=0, atol=0)


def test_a_result_has_its_outputs() -> None:
    result = lobo_fx.compile(Tuple(), example_inputs=torch.ones(2, 4), progress=False)
    with pytest.raises(InvalidInput, match="a Result has its outputs"):
        lobo_fx.compile(result, outputs="output_0")


def test_a_type_that_can_not_be_saved_is_named(tmp_path: Path) -> None:
    class Named(nn.Module):
        def forward(self, x: torch.Tensor) -> Pair:
            return Pair(x, x + 1)

    result = lobo_fx.compile(Named(), example_inputs=torch.ones(2, 3), progress=False)
    with pytest.raises(InvalidInput, match=r"can't be saved: .*Pair"):
        result.save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


class Unread(nn.Module):
    """Beside the first output: attention, dropout and recurrence, which draw nothing in inference."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.attention = nn.Linear(4, 4), nn.Linear(4, 12)
        self.recurrent, self.dropped = nn.LSTM(4, 3, batch_first=True), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.body(x)
        return {
            "hidden": hidden,
            "attended": nn.functional.scaled_dot_product_attention(*self.attention(hidden).chunk(3, -1)),
            "states": self.recurrent(hidden)[0],
            "dropped": nn.functional.dropout(self.dropped(hidden), 0.5, self.training),
        }


def test_what_draws_in_training_alone_goes_too() -> None:
    kept = keep_outputs(trace(Unread().eval(), torch.randn(2, 5, 4)), ["hidden"])
    assert {name for name, _ in kept.module.named_parameters()} == {"body.weight", "body.bias"}
    assert [node.target for node in kept.graph.nodes if node.op == "call_function"] == [torch.ops.aten.linear.default]


def test_what_draws_in_inference_stays() -> None:
    """The numbers that others draw after it would be different ones."""

    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"unread": nn.functional.dropout(x, 0.5, True), "noisy": x + torch.randn_like(x)}

    kept = keep_outputs(trace(Noisy().eval(), torch.randn(2, 5)), ["noisy"])
    assert torch.ops.aten.dropout.default in {node.target for node in kept.graph.nodes}
