"""Example inputs: what a user may pass, what a model tells of itself, and how a call is bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.export import Dim

from lobo_fx.capture.binding import check_arity
from lobo_fx.capture.freeing import free_sizes
from lobo_fx.capture.tracing import trace
from lobo_fx.contracts.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.inputs import Inputs, as_inputs
from lobo_fx.sources.known_inputs import find_inputs
from lobo_fx.terminal.quiet import quiet
from lobo_fx.testing import assert_untouched

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **SMALL))


def gpt2(**settings: Any) -> Any:
    sizes: dict[str, Any] = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **TOKENS, **settings))


def vit() -> Any:
    return transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, num_channels=1, **SMALL))


def whisper() -> Any:
    sizes: dict[str, Any] = {"d_model": 16, "vocab_size": 60, "num_mel_bins": 8, "max_source_positions": 10}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 32}
    config = transformers.WhisperConfig(**sizes, **TOKENS, decoder_start_token_id=1, use_cache=False)
    return transformers.WhisperModel(config)


class Sum(nn.Module):
    """Two inputs that must not be swapped, and a third that may be left out."""

    def forward(self, left: torch.Tensor, right: torch.Tensor, scale: Any = None) -> torch.Tensor:
        total = left - 2 * right
        return total if scale is None else total * scale


LEFT, RIGHT = torch.ones(2, 3), torch.full((2, 3), 5.0)


# --- what a user may pass --------------------------------------------------------------------------------


def test_a_tensor_a_tuple_a_list_and_a_dict() -> None:
    assert as_inputs(LEFT).args[0] is LEFT
    assert as_inputs((LEFT, RIGHT)).args == (LEFT, RIGHT)
    assert as_inputs([LEFT, RIGHT]).args == (LEFT, RIGHT)
    named = as_inputs({"left": LEFT, "right": RIGHT})
    assert named.args == ()
    assert dict(named.kwargs) == {"left": LEFT, "right": RIGHT}
    assert as_inputs(named) is named


@pytest.mark.parametrize("value", [3, 2.5, "images", object(), {1, 2}])
def test_anything_else_is_refused_with_what_to_pass(value: object) -> None:
    with pytest.raises(InvalidInput, match=rf"a {type(value).__name__}\. Pass example_inputs= a tensor, a tuple"):
        as_inputs(value)


@pytest.mark.parametrize("value", [(), {}, [], (3, "x"), {"scale": 2.0}])
def test_inputs_without_a_tensor_are_refused(value: object) -> None:
    with pytest.raises(InvalidInput, match="holds no tensor"):
        as_inputs(value)


def test_leaves_and_maps() -> None:
    inputs = Inputs(([LEFT, {"k": RIGHT}], 3), {"scale": LEFT})
    assert inputs.leaves == [LEFT, RIGHT, 3, LEFT]
    assert len(inputs.tensors) == 3
    doubled = inputs.map(lambda tensor: tensor * 2)
    assert torch.equal(doubled.args[0][1]["k"], RIGHT * 2)
    assert doubled.args[1] == 3
    assert torch.equal(inputs.args[0][0], LEFT)


def test_inputs_that_forward_can_take() -> None:
    check_arity(Sum(), Inputs((LEFT, RIGHT)))
    check_arity(Sum(), Inputs((LEFT,), {"right": RIGHT, "scale": 2.0}))


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        (Inputs((LEFT,)), "missing a required argument: 'right'"),
        (Inputs((LEFT,) * 4), "too many positional arguments"),
        (Inputs((LEFT, RIGHT), {"factor": LEFT}), "unexpected keyword argument 'factor'"),
        (Inputs((LEFT, RIGHT), {"left": LEFT}), "multiple values for argument 'left'"),
    ],
)
def test_inputs_that_forward_cannot_take(inputs: Inputs, complaint: str) -> None:
    with pytest.raises(InvalidInput) as error:
        check_arity(Sum(), inputs)
    assert complaint in str(error.value)
    assert "Sum.forward(" in str(error.value)
    assert "Pass example_inputs=" in str(error.value)


# --- the batch -------------------------------------------------------------------------------------------


def test_one_row_is_doubled_so_that_the_batch_stays_free() -> None:
    row, shared = torch.randn(1, 3), torch.randn(5)
    inputs, *_ = free_sizes(Inputs((row,), {"shared": shared}), lambda row, shared: row, "batch")
    assert torch.equal(inputs.args[0], torch.cat([row, row]))
    assert inputs.kwargs["shared"] is shared


def test_more_rows_stay_as_they_are() -> None:
    inputs, specification, asked = free_sizes(Inputs((LEFT, torch.randn(3, 2))), lambda left, right: left, "batch")
    assert not asked
    assert inputs.args[0] is LEFT
    assert list(specification["left"]) == [0]
    assert specification["right"] is None


def test_only_the_batch_is_doubled_where_a_table_has_as_few_rows() -> None:
    inputs, *_ = free_sizes(Inputs((torch.randn(1, 3), torch.randn(4, 3))), lambda x, table: x, "batch")
    assert [tuple(tensor.shape) for tensor in inputs.tensors] == [(2, 3), (4, 3)]


# --- what a model tells of itself ------------------------------------------------------------------------


def shapes(inputs: Inputs) -> dict[str, tuple[int, ...]]:
    named = {f"#{index}": value for index, value in enumerate(inputs.args)} | dict(inputs.kwargs)
    return {name: tuple(value.shape) for name, value in named.items()}


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (bert, {"input_ids": (2, 16)}),
        (gpt2, {"input_ids": (2, 16)}),
        (vit, {"pixel_values": (2, 1, 16, 16)}),
        (whisper, {"input_features": (2, 8, 20), "decoder_input_ids": (2, 16)}),
    ],
)
def test_hugging_face_models_tell_by_their_configuration(build: Any, expected: dict[str, tuple[int, ...]]) -> None:
    model = build()
    inputs = find_inputs(model)
    assert shapes(inputs) == expected
    for name, tensor in inputs.kwargs.items():
        if name.endswith("input_ids"):
            assert tensor.dtype == torch.int64
            assert 0 <= int(tensor.min()) <= int(tensor.max()) < model.config.vocab_size
    with torch.no_grad():
        model.eval()(**inputs.kwargs)


def test_timm_models_tell_by_their_settings() -> None:
    import timm  # here, for it defines as many modules as PyTorch, and a trace takes longer the more there are

    with quiet():
        model: Any = timm.create_model("test_vit", pretrained=False, num_classes=3)
    inputs = find_inputs(model)
    assert shapes(inputs) == {"#0": (2, *model.pretrained_cfg["input_size"])}
    assert model.eval()(*inputs.args).shape == (2, 3)


@pytest.mark.parametrize(
    "build",
    [bert, vit, *(pytest.param(build, marks=pytest.mark.slow) for build in (lambda: gpt2(use_cache=False), whisper))],
    ids=["bert", "vit", "gpt2", "whisper"],
)
def test_models_that_tell_trace_without_example_inputs(build: Callable[[], Any]) -> None:
    model = build().train()
    with assert_untouched(model):
        program = trace(model)
    assert all("has fixed sizes but for the batch" in note for note in program.notes)
    assert {spec.shape[0] for spec in program.signature.inputs if spec} == {"batch"}
    three_rows = program.example_inputs.map(lambda tensor: torch.cat([tensor, tensor[:1]]))
    expected, found = model.eval()(**three_rows.kwargs), program.run(three_rows)
    assert type(found) is type(expected)
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_decoder_with_its_cache_left_on_traces() -> None:
    model = gpt2()
    assert model.config.use_cache
    with assert_untouched(model):
        program = trace(model)
    tokens = program.example_inputs.kwargs["input_ids"]
    torch.testing.assert_close(program.run()["logits"], model.eval()(tokens).logits, rtol=1e-5, atol=1e-6)
    assert model.config.use_cache


def test_a_model_output_comes_back_as_one() -> None:
    model = bert().eval()
    program = trace(model)
    tokens = torch.randint(0, 50, (3, 16))
    expected, found = model(tokens), program.module(input_ids=tokens)
    assert torch.equal(found.pooler_output, expected.pooler_output)
    assert torch.equal(found["last_hidden_state"], found[0])
    assert [spec.name for spec in program.signature.outputs if spec] == ["last_hidden_state", "pooler_output"]


def test_dummy_inputs_are_taken_where_nothing_else_is_known() -> None:
    class Known(Sum):
        dummy_inputs: Mapping[str, torch.Tensor] = {"left": LEFT, "right": RIGHT}

    assert find_inputs(Known()).kwargs == {"left": LEFT, "right": RIGHT}


def test_found_inputs_are_the_same_each_time() -> None:
    model = vit()
    first, second = (find_inputs(model).kwargs["pixel_values"] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_finding_inputs_leaves_the_global_random_state_alone() -> None:
    model = bert()
    before = torch.get_rng_state()
    find_inputs(model)
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_that_says_nothing_is_refused_with_its_signature() -> None:
    with pytest.raises(InvalidInput) as error:
        find_inputs(Sum())
    message = str(error.value)
    assert message.startswith("Sum does not say what inputs it takes")
    assert "left: " in message
    assert "Pass example_inputs=" in message


# --- calls of a traced program ---------------------------------------------------------------------------


def test_a_call_by_position_and_by_name() -> None:
    module = trace(Sum(), (LEFT, RIGHT)).module
    left, right = torch.randn(4, 3), torch.randn(4, 3)
    expected = left - 2 * right
    for found in (module(left, right), module(left, right=right), module(right=right, left=left)):
        assert torch.equal(found, expected)


def test_a_program_traced_by_name_is_called_by_position_as_forward_has_them() -> None:
    module = trace(Sum(), {"right": RIGHT, "left": LEFT}).module
    left, right = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(module(right=right, left=left), left - 2 * right)
    assert torch.equal(module(left, right), left - 2 * right)


@pytest.mark.parametrize(
    ("args", "kwargs", "complaint"),
    [
        ((), {}, r"missing \['left', 'right'\]"),
        ((LEFT,), {}, r"missing \['right'\]"),
        ((LEFT, RIGHT, LEFT), {}, "3 inputs given, the program takes 2"),
        ((LEFT,), {"rihgt": RIGHT}, r"missing \['right'\], unknown \['rihgt'\]"),
        ((LEFT, RIGHT), {"left": LEFT}, r"\['left'\] given twice"),
        ((torch.ones(3), RIGHT), {}, r"'left' is float32\[3\], the program takes left: float32\[batch, 3\]"),
        ((torch.ones(2, 3, 1), RIGHT), {}, r"'left' is float32\[2, 3, 1\]"),
        ((torch.ones(2, 4), RIGHT), {}, r"'left' is float32\[2, 4\], the program takes left: float32\[batch, 3\]"),
        ((LEFT.double(), RIGHT), {}, r"'left' is float64\[2, 3\], the program takes left: float32"),
        ((LEFT, torch.ones(5, 3)), {}, r"'right' is float32\[5, 3\], the program takes right: float32\[batch, 3\]"),
        ((LEFT, 5.0), {}, "'right' is a float, expected right: float32"),
    ],
)
def test_a_call_that_does_not_fit(args: tuple[Any, ...], kwargs: dict[str, Any], complaint: str) -> None:
    module = trace(Sum(), (LEFT, RIGHT), "batch").module
    assert module(LEFT, RIGHT).shape == (2, 3)
    with pytest.raises(InvalidInput, match=complaint):
        module(*args, **kwargs)


def test_a_constant_input_can_not_change() -> None:
    module = trace(Sum(), {"left": LEFT, "right": RIGHT, "scale": 2.0}).module
    assert torch.equal(module(left=LEFT, right=RIGHT, scale=2.0), (LEFT - 2 * RIGHT) * 2)
    with pytest.raises(InvalidInput, match="scale"):
        module(left=LEFT, right=RIGHT, scale=3.0)
    with pytest.raises(InvalidInput, match=r"a tensor given where 2\.0 was traced as a constant"):
        module(left=LEFT, right=RIGHT, scale=torch.tensor([2.0, 2.0]))


class Nested(nn.Module):
    def forward(self, pair: list[torch.Tensor], options: dict[str, torch.Tensor]) -> torch.Tensor:
        return pair[0] - pair[1] * options["weight"]


def test_nested_inputs() -> None:
    module = trace(Nested(), ([LEFT, RIGHT], {"weight": RIGHT})).module
    rows = torch.randn(4, 3)
    assert torch.equal(module([rows, rows], {"weight": rows}), rows - rows * rows)
    assert torch.equal(module(options={"weight": rows}, pair=[rows, rows]), rows - rows * rows)


def test_nested_inputs_are_taken_by_their_keys() -> None:
    class Options(nn.Module):
        def forward(self, options: dict[str, Any]) -> torch.Tensor:
            return options["a"] - options["more"]["b"] * options["more"]["c"]  # type: ignore[no-any-return]

    module = trace(Options(), ({"a": LEFT, "more": {"b": RIGHT, "c": LEFT}},)).module
    assert torch.equal(module({"more": {"c": LEFT, "b": RIGHT}, "a": LEFT}), LEFT - RIGHT * LEFT)


def test_a_batch_is_free_beside_a_computed_size_whose_name_holds_its_own() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x], 1) + y

    n, long = Dim("n"), Dim("long_n")
    sizes = {"x": {0: n, 1: long}, "y": {0: n, 1: 2 * long}}
    program = trace(Twice(), (torch.randn(3, 4), torch.randn(3, 8)), sizes)
    assert str(program.signature) == "x: float32[n, long_n]; y: float32[n, 2*long_n]"
    assert program.signature.batch == "n"


@pytest.mark.parametrize(
    "args",
    [
        ([LEFT, RIGHT], {"wieght": RIGHT}),
        ([LEFT], {"weight": RIGHT}),
        ([LEFT, RIGHT, RIGHT], {"weight": RIGHT}),
        (LEFT, {"weight": RIGHT, "more": LEFT}),
    ],
)
def test_nested_inputs_that_nest_otherwise(args: tuple[Any, ...]) -> None:
    module = trace(Nested(), ([LEFT, RIGHT], {"weight": RIGHT})).module
    with pytest.raises(InvalidInput, match="the inputs nest as "):
        module(*args)


def test_batches_of_a_data_loader() -> None:
    signature = trace(Sum(), (LEFT, RIGHT)).signature
    labels = torch.zeros(2)
    for batch in ((LEFT, RIGHT, labels), [LEFT, RIGHT], {"right": RIGHT, "left": LEFT, "labels": labels}):
        bound = signature.bind_batch(batch)
        assert bound.args[0] is LEFT
        assert bound.args[1] is RIGHT
    with pytest.raises(InvalidInput, match=r"missing \['right'\]"):
        signature.bind_batch({"left": LEFT, "labels": labels})
    with pytest.raises(InvalidInput, match="a batch is a int"):
        signature.bind_batch(3)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> Any:
        return self.linear(x) * scale


@pytest.mark.parametrize("nest", [tuple, list, lambda pair: dict(zip(("x", "scale"), pair, strict=True))])
def test_batches_with_their_inputs_nested_first(nest: Any) -> None:
    pair = (torch.randn(2, 4), torch.randn(2, 1))
    signature = trace(TwoInputs(), pair).signature
    bound = signature.bind_batch((nest(pair), torch.zeros(2)))
    assert [torch.equal(a, b) for a, b in zip(bound.tensors, pair, strict=True)] == [True, True]
    context = Context(signature, train_data=[(nest(pair), torch.ones(2))], loss_fn=torch.nn.functional.mse_loss)
    ((inputs, label),) = context.training_batches()
    assert torch.equal(inputs.tensors[0], pair[0])
    assert torch.equal(label, torch.ones(2))


def test_an_input_that_is_a_tuple_itself_is_not_taken_for_a_nested_batch() -> None:
    class Pair(nn.Module):
        def forward(self, pair: Any) -> Any:
            return pair[0] + pair[1]

    pair = (torch.randn(2, 4), torch.randn(2, 4))
    signature = trace(Pair(), (pair,)).signature
    bound = signature.bind_batch((pair, torch.zeros(2)))
    assert torch.equal(bound.tensors[1], pair[1])
