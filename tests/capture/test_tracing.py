"""From a model to a program: same numbers, same structure, the batch free, the model untouched."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import lobo_fx
from lobo_fx.capture.tracing import trace
from lobo_fx.contracts.passbase import Pass
from lobo_fx.errors import InvalidInput, LoboError, TraceError
from lobo_fx.graph.inputs import Inputs
from lobo_fx.measures.counts import run_counted
from lobo_fx.passes import QuantizeStatic
from lobo_fx.testing import assert_untouched

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def convnet() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5))


def line_of(function: Callable[..., object], code: str) -> str:
    """`file.py:12`, where `function`'s source has `code`."""
    lines, start = inspect.getsourcelines(function)
    offset = next(index for index, line in enumerate(lines) if code in line)
    return f"{Path(__file__).name}:{start + offset}"


def equal(expected: object, found: object) -> bool:
    old, new = pytree.tree_leaves(expected), pytree.tree_leaves(found)
    return len(old) == len(new) and all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


# --- the model stays as it was ---------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_tracing_leaves_the_model_as_it_was(training: bool) -> None:
    model = convnet().train(training)
    model[0].requires_grad_(False)
    with assert_untouched(model):
        program = trace(model, IMAGES)
    assert not program.module.training
    assert [p.requires_grad for p in program.module.parameters()] == [p.requires_grad for p in model.parameters()]
    assert equal(model.eval()(IMAGES), program.module(IMAGES))


def test_every_submodule_keeps_its_own_mode() -> None:
    model = convnet().train()
    model[1].eval()
    with assert_untouched(model):
        trace(model, IMAGES)
    assert [module.training for module in model] == [True, False, True, True]


def test_caches_are_off_in_every_part_of_a_model_and_on_again_afterwards() -> None:
    class Part(nn.Module):
        def __init__(self, cached: bool) -> None:
            super().__init__()
            self.config = types.SimpleNamespace(use_cache=cached)

        def forward(self, x: torch.Tensor) -> Any:
            return (x, object()) if self.config.use_cache else (x + 1,)

    model = nn.Sequential(Part(True), nn.Flatten(), nn.Sequential(Part(True), Part(False)))
    model.forward = lambda x: [part(x) for part in model.modules() if isinstance(part, Part)]  # type: ignore[method-assign]
    assert len(trace(model, torch.randn(2, 3)).signature.outputs) == 3
    assert [part.config.use_cache for part in model.modules() if isinstance(part, Part)] == [True, True, False]


def test_a_model_that_can_not_be_traced_keeps_its_mode_too() -> None:
    model = Branching().train()
    with assert_untouched(model), pytest.raises(TraceError):
        trace(model, torch.randn(2, 3))


def test_assert_untouched_notices() -> None:
    model = convnet()
    with pytest.raises(AssertionError, match="weight"), assert_untouched(model), torch.no_grad():
        model[0].weight.add_(1)  # type: ignore[operator]
    with pytest.raises(AssertionError, match="mode"), assert_untouched(model):
        model.eval()


def test_compiling_leaves_the_buffers_of_a_model_that_counts_its_calls() -> None:
    class Counting(nn.Module):
        calls: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1)
            return x + self.calls

    model = Counting().eval()
    with assert_untouched(model):
        result = lobo_fx.compile(model, ["fold_batch_norm"] * 2, example_inputs=torch.randn(2, 3), progress=False)
    assert float(result.module.get_buffer("calls")) == 0


def test_the_program_shares_the_weights_and_a_clone_does_not() -> None:
    model = convnet()
    program = trace(model, IMAGES)
    assert program.module.get_parameter("0.weight") is model[0].weight
    assert program.clone().module.get_parameter("0.weight") is not model[0].weight


def test_a_buffer_left_out_of_the_state_dict_stays_out() -> None:
    class Table(nn.Module):
        table: torch.Tensor
        kept: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(3.0), persistent=False)
            self.register_buffer("kept", torch.arange(3.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.table + self.kept

    program = trace(Table(), torch.randn(2, 3)).clone()
    assert list(program.module.state_dict()) == ["kept"]
    assert torch.equal(program.module.get_buffer("table"), torch.arange(3.0))


# --- the batch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_batch_is_free_however_many_rows_the_example_has(rows: int) -> None:
    model = convnet().eval()
    program = trace(model, torch.randn(rows, 3, 8, 8))
    assert str(program.signature) == "input: float32[batch, 3, 8, 8]"
    assert [str(spec) for spec in program.signature.outputs] == ["output: float32[batch, 4, 6, 6]"]
    assert program.example_inputs.tensors[0].shape[0] == rows
    assert not program.notes
    for count in (1, 3, 7):
        images = torch.randn(count, 3, 8, 8)
        assert equal(model(images), program.module(images))


def test_static_shapes() -> None:
    program = trace(convnet(), IMAGES, dynamic_shapes=None)
    assert str(program.signature) == "input: float32[2, 3, 8, 8]"
    assert not program.notes
    with pytest.raises(InvalidInput, match=r"float32\[3, 3, 8, 8\]"):
        program.module(torch.randn(3, 3, 8, 8))


def test_a_static_single_row_stays_single() -> None:
    program = trace(convnet(), IMAGES[:1], dynamic_shapes=None)
    assert str(program.signature) == "input: float32[1, 3, 8, 8]"


def test_the_specification_of_torch_export() -> None:
    model = convnet().eval()
    program = trace(model, IMAGES, dynamic_shapes=({0: Dim.AUTO, 2: Dim("height", min=4, max=64)},))
    assert str(program.signature) == "input: float32[batch, 3, height, 8]"
    images = torch.randn(3, 3, 20, 8)
    assert equal(model(images), program.module(images))
    with pytest.raises(
        InvalidInput,
        match=r"'input' is float32\[3, 3, 20, 9\], the program takes input: float32\[batch, 3, height, 8\]",
    ):
        program.module(torch.randn(3, 3, 20, 9))


class FixedBatch(nn.Module):
    """Its code holds the batch size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(2, 3, -1).sum(1)


def test_a_model_that_fixes_the_batch_is_traced_as_it_is_and_says_so() -> None:
    x = torch.randn(2, 12)
    program = trace(FixedBatch(), x, "batch")
    assert str(program.signature) == "x: float32[2, 12]"
    assert equal(FixedBatch()(x), program.module(x))
    (note,) = program.notes
    assert re.fullmatch(
        r"the batch size is fixed: .*test_tracing\.py:\d+: return x\.view\(2, 3, -1\).* depends on it", note
    )


def test_a_weight_that_forward_writes_into_is_named_unless_it_is_frozen() -> None:
    model, tokens = nn.Sequential(nn.Embedding(10, 8, max_norm=0.5), nn.Linear(8, 4)), torch.tensor([[1, 2], [3, 1]])
    with pytest.raises(TraceError, match=r"forward writes into the weight '0\.weight' .*freeze it"):
        trace(model, tokens)
    model.requires_grad_(False)
    torch.testing.assert_close(trace(copy.deepcopy(model), tokens).module(tokens), model(tokens), rtol=0, atol=0)


def test_a_result_that_is_compiled_further_tells_each_note_once() -> None:
    first = lobo_fx.compile(FixedBatch(), example_inputs=torch.randn(2, 12), dynamic_shapes="batch", progress=False)
    again = lobo_fx.compile(first, progress=False)
    assert again.report.notes == first.report.notes != []


def test_the_line_that_fixes_a_size_is_told_beside_torchs_suggestion_and_whose_it_is() -> None:
    class Compares(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin() if x.shape[0] == 2 else x.cos()

    replace = ShapeEnv._set_replacement
    with pytest.raises(TraceError, match=r"test_tracing\.py:\d+: return x\.sin\(\) if.*[\s\S]*Suggested fixes"):
        trace(Compares(), torch.randn(2, 3), {"x": {0: Dim("rows")}})
    assert ShapeEnv._set_replacement is replace
    (note,) = trace(nn.Sequential(nn.Unflatten(0, (2, -1))), torch.randn(2, 3)).notes
    assert note.startswith("the batch size is fixed: ")
    assert "test_tracing" not in note, "it is torch's own module"


def test_a_note_on_the_batch_names_the_users_line_or_none_and_never_torchs() -> None:
    class OneRow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(1, 3) + 1

    program = trace(OneRow(), torch.randn(1, 3))
    assert str(program.signature) == "x: float32[1, 3]"
    (note,) = program.notes
    assert note.startswith("the batch size is fixed: ")
    assert "site-packages" not in note


@pytest.mark.parametrize("count", [2, 4])
def test_inputs_taken_as_star_arguments_keep_the_batch_free(count: int) -> None:
    class Gather(nn.Module):
        def forward(self, first: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            return first - torch.stack(rest).sum(0)

    program = trace(Gather(), tuple(torch.randn(2, 3) for _ in range(count)))
    assert not program.notes
    assert [spec.shape for spec in program.signature.inputs if spec] == [("batch", "length")] * count
    parts = [torch.randn(5, 3) for _ in range(count)]
    assert equal(Gather()(*parts), program.module(*parts))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_inputs_taken_by_name_through_star_arguments_keep_the_batch_free(count: int) -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return x * scale

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrapped = Scaled()

        def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
            return self.wrapped(*args, **kwargs)

    model, given = Wrapper(), {"x": torch.randn(2, 3), "scale": torch.randn(2, 3)}
    names = list(given)
    inputs = Inputs(tuple(given[name] for name in names[:count]), {name: given[name] for name in names[count:]})
    result = lobo_fx.compile(model, example_inputs=inputs, progress=False)
    assert "forward" not in vars(model)
    assert not result.report.notes
    assert [spec.shape for spec in result.program.signature.inputs if spec] == [("batch", "length")] * 2
    parts = torch.randn(5, 3), torch.randn(5, 3)
    by_name = dict(zip(names[count:], parts[count:], strict=True))
    assert equal(parts[0] * parts[1], result.module(*parts[:count], **by_name))


def test_inputs_named_by_no_parameter_can_be_freed_by_name() -> None:
    class Wrapper(nn.Module):
        def forward(self, **kwargs: torch.Tensor) -> torch.Tensor:
            return kwargs["x"] + 1

    program = trace(Wrapper(), {"x": torch.randn(2, 3)}, {"x": {1: Dim("width", min=2)}})
    assert str(program.signature) == "x: float32[2, width]"


def test_an_input_without_the_batch_keeps_its_size() -> None:
    class Table(nn.Module):
        def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return F.linear(x, table)

    program = trace(Table(), (torch.randn(1, 3), torch.randn(4, 3)))
    assert str(program.signature) == "x: float32[batch, length]; table: float32[4, length]"


# --- structure -------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    low: torch.Tensor
    high: torch.Tensor


STRUCTURES: dict[str, tuple[Callable[[torch.Tensor], Any], list[str]]] = {
    "tensor": (lambda x: x + 1, ["output"]),
    "tuple": (lambda x: (x, x + 1), ["output_0", "output_1"]),
    "list": (lambda x: [x + 1], ["output"]),
    "dict": (lambda x: {"logits": x * 2, "hidden": (x, [x + 1])}, ["logits", "hidden.0", "hidden.1.0"]),
    "named tuple": (lambda x: Pair(x - 1, x + 1), ["low", "high"]),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_outputs_nest_as_the_model_nests_them(name: str) -> None:
    compute, names = STRUCTURES[name]

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return compute(x)

    x = torch.randn(2, 3)
    program = trace(Model(), x)
    found = program.module(x)
    assert type(found) is type(compute(x))
    assert pytree.tree_structure(found) == pytree.tree_structure(compute(x))
    assert equal(compute(x), found)
    assert [spec.name for spec in program.signature.outputs if spec] == names


class Keyless(dict[str, Any]):
    """An output as diffusers has them: registered without the paths of its keys."""


class Sealed(Keyless):
    """The context does not say the keys."""


torch.utils._pytree.register_pytree_node(
    Keyless,
    lambda found: (list(found.values()), list(found)),
    lambda values, keys: Keyless(zip(keys, values, strict=True)),
)
torch.utils._pytree.register_pytree_node(
    Sealed,
    lambda found: (list(found.values()), None),
    lambda values, _: Sealed(zip(["sample", "parts"], values, strict=True)),
)


@pytest.mark.parametrize(
    ("kind", "names"),
    [(Keyless, ["sample", "parts.0", "parts.1"]), (Sealed, ["output_0", "output_1.0", "output_1.1"])],
)
def test_outputs_of_a_type_registered_without_key_paths(kind: type[Keyless], names: list[str], tmp_path: Path) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> Keyless:
            return kind(sample=x + 1, parts=(x * 2, x * 3))

    result = lobo_fx.compile(Model(), example_inputs=torch.randn(2, 3), progress=False)
    assert [spec.name for spec in result.program.signature.outputs if spec] == names
    result.export(tmp_path / "model.onnx")
    assert isinstance(result.module(torch.randn(2, 3)), kind)


def test_recurrent_layers_trace_with_a_free_batch() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True)
            self.gru = nn.GRU(10, 3, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.gru(self.lstm(x)[0])[0]
            return found

    model = Recurrent().eval()
    program = trace(model, torch.randn(2, 6, 4))
    assert str(program.signature) == "x: float32[batch, length, 4]"
    x = torch.randn(5, 9, 4)
    assert equal(model(x), program.module(x))


# --- exported programs -----------------------------------------------------------------------------------


def test_an_exported_program() -> None:
    model = convnet().eval()
    exported = torch.export.export(model, (IMAGES,), dynamic_shapes=({0: Dim.AUTO},))
    program = trace(exported)
    assert str(program.signature) == "input: float32[batch, 3, 8, 8]"
    images = torch.randn(5, 3, 8, 8)
    assert equal(model(images), program.module(images))
    assert list(program.module.state_dict()) == list(model.state_dict())


def test_an_exported_program_with_fixed_sizes_and_other_example_inputs() -> None:
    exported = torch.export.export(convnet().eval(), (IMAGES,))
    program = trace(exported, IMAGES * 2)
    assert torch.equal(program.example_inputs.tensors[0], IMAGES * 2)
    with pytest.raises(InvalidInput, match=r"float32\[2, 3, 9, 9\], the program takes input: float32\[2, 3, 8, 8\]"):
        trace(exported, torch.randn(2, 3, 9, 9))


def test_free_sizes_are_chosen_once(tmp_path: Path) -> None:
    exported = torch.export.export(convnet().eval(), (IMAGES,))
    torch.export.save(exported, tmp_path / "model.pt2")
    program = trace(exported)
    models: list[Any] = [exported, tmp_path / "model.pt2", program, lobo_fx.compile(program, progress=False)]
    for model in models:
        for sizes in ("batch", None, {"input": {0: Dim.AUTO}}):
            with pytest.raises(InvalidInput, match="leave dynamic_shapes out"):
                lobo_fx.compile(model, dynamic_shapes=sizes, progress=False)


def test_a_program_exported_in_training_mode_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    (note,) = trace(torch.export.export(model.train(), (torch.randn(3, 4),))).notes
    assert "training mode, and kept in it: aten.batch_norm.default, aten.dropout.default; " in note
    assert "model.eval()" in note
    assert not trace(torch.export.export(model.eval(), (torch.randn(3, 4),))).notes


@pytest.mark.parametrize("kind", [str, Path])
def test_a_pt2_file(kind: Callable[[Path], str | Path], tmp_path: Path) -> None:
    model = convnet().eval()
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (IMAGES,), dynamic_shapes=({0: Dim.AUTO},)), path)
    program = trace(kind(path))
    images = torch.randn(4, 3, 8, 8)
    assert equal(model(images), program.module(images))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no file .*nothing\.pt2"):
        trace(tmp_path / "nothing.pt2")
    (tmp_path / "text.pt2").write_text("not an archive")
    with pytest.raises(InvalidInput, match=r"text\.pt2"):
        trace(tmp_path / "text.pt2")


@pytest.mark.parametrize("model", [3, None, torch.randn(3), nn.Linear])
def test_something_else_than_a_model(model: Any) -> None:
    with pytest.raises(InvalidInput, match=f"model is a {type(model).__name__}; expected an nn.Module"):
        trace(model, torch.randn(1, 3))


# --- what can not be traced ------------------------------------------------------------------------------


class Branching(nn.Module):
    """Its Python depends on the data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_data_dependent_control_flow_names_the_users_own_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TraceError) as error:
        trace(Branching(), torch.randn(2, 3))
    first, *rest = str(error.value).splitlines()
    assert first.startswith("torch.export can't capture Branching at ")
    assert line_of(Branching.forward, "if x.sum()") in first
    assert first.endswith("if x.sum() > 0:")
    assert "data-dependent" in rest[0]
    assert isinstance(error.value, LoboError)
    assert capfd.readouterr() == ("", ""), "a library's own output reached the terminal"


def test_the_same_model_without_the_branch_traces() -> None:
    class Straight(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(x.sum() > 0, x, -x)

    x = torch.randn(2, 3)
    assert equal(Straight()(x), trace(Straight(), x).module(x))


def test_a_line_in_a_submodule_is_named_too() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Branching())
    with pytest.raises(TraceError) as error:
        trace(model, torch.randn(2, 3))
    assert line_of(Branching.forward, "if x.sum()") in str(error.value)


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param(torch.randn(3, 8), id="rank 2"),
        pytest.param(torch.randn(8), id="rank 1"),
        pytest.param(torch.randn(2, 5, 8, 8), id="channels"),
        pytest.param(torch.ones(2, 3, 8, 8, dtype=torch.int64), id="dtype"),
        pytest.param((IMAGES, IMAGES), id="too many"),
        pytest.param({"images": IMAGES}, id="unknown name"),
        pytest.param(None, id="none"),
    ],
)
def test_example_inputs_that_the_model_can_not_take(inputs: object) -> None:
    with pytest.raises(InvalidInput) as error:
        trace(convnet(), inputs)
    assert "Sequential" in str(error.value)
    assert "example_inputs" in str(error.value)
    assert "site-packages" not in str(error.value)


def test_a_model_that_can_not_be_traced_leaves_its_inputs_as_they_are() -> None:
    class Reshapes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1).unsqueeze_(1) * 2

    x = torch.ones(2, 3)
    with pytest.raises(TraceError, match="can't capture Reshapes"):
        trace(Reshapes(), x)
    assert torch.equal(x, torch.ones(2, 3))


def test_a_missing_input() -> None:
    with pytest.raises(InvalidInput, match="missing a required argument"):
        trace(nn.Bilinear(3, 3, 2), torch.randn(2, 3))


# --- where nodes come from -------------------------------------------------------------------------------


def test_nodes_keep_the_users_module_and_line() -> None:
    from lobo_fx.graph.provenance import describe, module_name

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.body(x) * 2
            return found

    nodes = {str(node.target): node for node in trace(Outer(), torch.randn(2, 3)).graph.nodes}
    assert module_name(nodes["aten.linear.default"]) == "body.0"
    assert module_name(nodes["aten.relu.default"]) == "body.1"
    assert module_name(nodes["aten.mul.Tensor"]) == ""
    text = describe(nodes["aten.linear.default"])
    assert text.startswith("aten.linear.default in module 'body.0' (")
    assert line_of(Outer.forward, "self.body(x) * 2") in text


def test_tracing_twice_gives_the_same_graph() -> None:
    model = convnet()
    assert str(trace(model, IMAGES).graph) == str(trace(copy.deepcopy(model), IMAGES).graph)


def test_a_length_that_nobody_gave_is_free_or_noted() -> None:
    class Text(nn.Module):
        main_input_name, config = "input_ids", types.SimpleNamespace(vocab_size=9)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids + 1

    assert not trace(Text()).notes
    (note,) = trace(Text(), dynamic_shapes="batch").notes
    assert note.startswith("'input_ids' has a fixed length of 16, chosen for want of example inputs")
    assert not trace(Text(), {"input_ids": torch.zeros(2, 16, dtype=torch.long)}).notes
    assert not trace(Text(), dynamic_shapes={"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}}).notes


def test_words_that_name_no_dynamic_shapes_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"dynamic_shapes is 'static'; it must be 'auto', 'batch', 'all', None"):
        trace(nn.Linear(4, 3), torch.randn(2, 4), "static")


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(InvalidInput, match="meta device and holds no weights"):
        trace(nn.Linear(4, 3, device="meta"), torch.randn(2, 4))


class Constants(nn.Module):
    """Tensors outside the state dict: plain attributes, an index, a buffer that is not persistent; and one inside."""

    table: torch.Tensor
    kept: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.inner = nn.Linear(8, 3), nn.Module()
        self.scale = torch.tensor([1.0, 2.0, 3.0])
        self.inner.shift = torch.ones(3)
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.register_buffer("kept", torch.full((3,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)[:, [2, 1, 0]] * self.scale + self.inner.shift
        found: torch.Tensor = y + self.table * self.kept * torch.tensor([1.0, 2.0, 3.0])
        return found


@pytest.mark.parametrize("passes", [[], [QuantizeStatic(kernels="all")]], ids=["traced", "quantized"])
def test_constants_are_in_no_state_dict_and_are_saved_all_the_same(passes: list[Pass], tmp_path: Path) -> None:
    model, x = Constants(), torch.randn(4, 8)
    result = lobo_fx.compile(model, passes, example_inputs=x, calibration_data=[x], progress=False)
    loaded = lobo_fx.load(result.save(tmp_path / "saved"))
    for module in (result.module, copy.deepcopy(result.module), loaded.module):
        names = module.state_dict().keys()
        assert {name for name in names if not name.startswith("layer.")} == {"kept"}
        assert torch.equal(module(x), result.module(x))
    if not passes:
        result.module.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()})
        twice = copy.deepcopy(model)
        twice.load_state_dict(result.module.state_dict())
        torch.testing.assert_close(result.module(x), twice(x))


class Remembering(nn.Module):
    """Sets what it can of itself, and of what it holds, while it runs."""

    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls, self.seen, self.names = nn.Linear(4, 4), 0, [1.0], {"first"}
        self.register_buffer("total", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache, self.calls = x * 2, self.calls + 1
        self.layer.last = x
        self.total = self.total + 1
        self.seen.append(2.0)
        self.names.add("second")
        found: torch.Tensor = self.layer(x) + self.cache
        return found


@pytest.mark.parametrize("training", [False, True])
def test_what_forward_sets_is_not_left_on_the_users_model(training: bool) -> None:
    own, x = Remembering(), torch.randn(2, 4)
    model = nn.Sequential(own, nn.Dropout()).train(training)
    model[1].eval()
    with assert_untouched(model):
        program = trace(model, x)
    assert (own.calls, own.seen, own.names) == (0, [1.0], {"first"})
    assert not hasattr(own, "cache")
    assert torch.equal(program.run(), model.eval()(x))


def test_the_test_kit_sees_an_attribute_that_is_left() -> None:
    model = Remembering()
    with (
        pytest.raises(AssertionError, match="attributes of a Remembering were changed: cache"),
        assert_untouched(model),
    ):
        model.cache = torch.ones(1)


def test_what_nobody_reads_is_not_run() -> None:
    """Multiply-accumulates are counted as they run: 4 · 3 of the layer, none of the attention and the recurrence."""

    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.recurrent = nn.Linear(4, 3), nn.GRU(4, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            states = self.recurrent(x)[0]
            nn.functional.scaled_dot_product_attention(states, states, states)
            result: torch.Tensor = self.layer(x[:, 0])
            return result

    program = trace(Unread().eval(), torch.randn(2, 5, 4))
    assert run_counted(program)[1] == 12


@dataclasses.dataclass
class Answer:
    value: torch.Tensor


class Answers(nn.Module):
    def forward(self, x: torch.Tensor) -> Answer:
        return Answer(x * 2)


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.lstm(packed)[1][0]


@pytest.mark.parametrize(
    ("model", "inputs", "advice"),
    [
        (Answers(), torch.randn(2, 3), r"Register the class: torch\.export\.register_dataclass"),
        (Packs(), (torch.randn(3, 6, 4), torch.tensor([6, 3, 2])), "Packed sequences have no graph: .* padded rows"),
    ],
)
def test_what_to_do_is_told_for_outputs_and_packed_sequences(model: nn.Module, inputs: Any, advice: str) -> None:
    with pytest.raises(TraceError, match=advice):
        trace(model, inputs)
