"""What the compiler holds every pass to: for each contract a pass that breaks it, and a good twin."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

import lobo_fx
from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import EXACT_TOLERANCE, Pass, Promise
from lobo_fx.contracts.verification import first_nonfinite
from lobo_fx.errors import ContractError, InvalidInput, LoboError
from lobo_fx.graph.node_facts import facts_of
from lobo_fx.graph.operators import aten
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import module_name, source_line
from lobo_fx.passes import MixedPrecision, PruneChannels, QuantizeStatic
from lobo_fx.testing import assert_untouched, check_pass

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(torch.tanh(self.up(x)))
        return found


class Model(nn.Module):
    """Two inputs, the second unused; two outputs, one of them integers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.body(x)
        return {"scores": scores, "best": scores.argmax(1)}


Change = Callable[[Program], Program | None]


@dataclasses.dataclass(frozen=True)
class Rewrite(Pass):
    """Does what it is told, and promises nothing."""

    change: Change

    def run(self, program: Program, context: Context) -> Program:
        changed = self.change(program) or program
        changed.module.recompile()
        return changed


@dataclasses.dataclass(frozen=True)
class ExactRewrite(Rewrite):
    """Does what it is told, and promises exactness."""

    promise: ClassVar[Promise] = Promise.EXACT


@functools.cache
def traced() -> Program:
    """The model, once for all passes that are tried on it; its weights are those of the program too."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return lobo_fx.trace(Model(), (X, torch.ones(3, 2)))


@contextlib.contextmanager
def untouched(model: nn.Module | None) -> Iterator[None]:
    """Asserts that a block leaves a model, or the traced one, as it was."""
    if model is not None:
        with assert_untouched(model):
            yield
        return
    before = copy.deepcopy(traced().module.state_dict())
    graph = str(traced().graph)
    yield
    after = traced().module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert str(traced().graph) == graph


def verified(pass_: Pass, model: nn.Module | None = None, example_inputs: Any = None) -> lobo_fx.Result:
    """Runs one pass under all checks of the compiler and of the test kit."""
    if model is not None:
        return check_pass(pass_, model, (X, torch.ones(3, 2)) if example_inputs is None else example_inputs)
    with untouched(None):
        result = lobo_fx.compile(traced(), [pass_], progress=False)
    assert result.program.signature == traced().signature
    assert copy.deepcopy(result.module).state_dict().keys() == result.module.state_dict().keys()
    return result


def complaint(pass_: Pass, *words: str, model: nn.Module | None = None, example_inputs: Any = None) -> str:
    """What the verifier says of a bad pass; it must name the pass."""
    with untouched(model), pytest.raises(ContractError) as error:
        verified(pass_, model, example_inputs)
    message = str(error.value)
    assert type(pass_).__name__ in message
    for word in words:
        assert word in message, message
    return message


def node_of(program: Program, target: Any, index: int = 0) -> fx.Node:
    found: fx.Node = program.graph.find_nodes(op="call_function", target=target)[index]
    return found


def after(program: Program, node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Puts a call of `target` on `node` between it and its readers."""
    with program.graph.inserting_after(node):
        new = program.graph.call_function(target, (node, *args))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


def scores_of(program: Program) -> fx.Node:
    """The node whose value is the output `scores`."""
    return node_of(program, aten.linear.default, 1)


def edit_interface(program: Program, **changes: Any) -> None:
    codegen = program.graph._codegen
    codegen.pytree_info = codegen.pytree_info._replace(**changes)  # type: ignore[attr-defined]


# --- the passes that break a contract, and their twins ---------------------------------------------------


def test_a_pass_that_does_nothing_is_fine() -> None:
    result = verified(ExactRewrite(lambda program: None))
    assert result.report.rows[-1].snr == float("inf")


def test_output_shape() -> None:
    def grow(program: Program) -> None:
        after(program, scores_of(program), aten.unsqueeze.default, 1)

    def grow_and_shrink(program: Program) -> None:
        after(program, after(program, scores_of(program), aten.unsqueeze.default, 1), aten.squeeze.dim, 1)

    complaint(
        Rewrite(grow),
        "an output changed from scores: float32[batch, 5] to scores: float32[batch, 1, 5]",
    )
    verified(ExactRewrite(grow_and_shrink))


def test_fewer_columns() -> None:
    def cut(program: Program) -> None:
        after(program, scores_of(program), aten.slice.Tensor, 1, 0, 4)

    def cut_nothing(program: Program) -> None:
        after(program, scores_of(program), aten.slice.Tensor, 1, 0, 5)

    complaint(Rewrite(cut), "scores: float32[batch, 5] to scores: float32[batch, 4]")
    verified(ExactRewrite(cut_nothing))


def test_output_dtype() -> None:
    def widen(program: Program) -> None:
        after(program, scores_of(program), aten.to.dtype, torch.float64)

    def widen_and_narrow(program: Program) -> None:
        after(program, after(program, scores_of(program), aten.to.dtype, torch.float64), aten.to.dtype, torch.float32)

    complaint(Rewrite(widen), "scores: float32[batch, 5] to scores: float64[batch, 5]")
    verified(ExactRewrite(widen_and_narrow))


def test_integer_output_dtype() -> None:
    def narrow(program: Program) -> None:
        after(program, node_of(program, aten.argmax.default), aten.to.dtype, torch.int32)

    complaint(Rewrite(narrow), "best: int64[batch] to best: int32[batch]")


def test_output_structure() -> None:
    def as_tuple(program: Program) -> None:
        edit_interface(program, out_spec=torch.utils._pytree.tree_structure((0, 0)))

    def same(program: Program) -> None:
        edit_interface(program, out_spec=torch.utils._pytree.tree_structure({"scores": 0, "best": 0}))

    complaint(Rewrite(as_tuple), "the output structure changed from")
    verified(ExactRewrite(same))


def test_outputs_in_another_order() -> None:
    def swap(program: Program) -> None:
        output = program.graph.output_node()
        output.args = (tuple(reversed(output.args[0])),)  # type: ignore[arg-type]

    complaint(Rewrite(swap), "an output changed from scores: float32[batch, 5]")


def test_a_dropped_output() -> None:
    def drop(program: Program) -> None:
        output = program.graph.output_node()
        output.args = ((scores_of(program),),)
        program.graph.eliminate_dead_code()

    def drop_by_the_book(program: Program) -> None:
        drop(program)
        edit_interface(program, out_spec=torch.utils._pytree.tree_structure({"scores": 0}))

    complaint(Rewrite(drop), "left a program that does not run", "`leaves` has length 1")
    complaint(Rewrite(drop_by_the_book), "the output structure changed from")


def test_a_dropped_input() -> None:
    def drop(program: Program) -> None:
        unused = program.graph.find_nodes(op="placeholder")[1]
        program.graph.erase_node(unused)

    def drop_by_the_book(program: Program) -> None:
        drop(program)
        edit_interface(program, orig_args=["x"], in_spec=torch.utils._pytree.tree_structure(((0,), {})))

    complaint(Rewrite(drop), "left a program that does not run", "too many values to unpack")
    complaint(Rewrite(drop_by_the_book), "left a program that does not run", "takes 2 positional arguments")


def test_a_renamed_input() -> None:
    def rename(program: Program) -> None:
        edit_interface(program, orig_args=["x", "attention_mask"])

    def same(program: Program) -> None:
        edit_interface(program, orig_args=["x", "mask"])

    complaint(Rewrite(rename), "the arguments of a call changed from (x, mask) to (x, attention_mask)")
    verified(ExactRewrite(same))


def test_a_renamed_placeholder() -> None:
    def rename(program: Program) -> None:
        program.graph.find_nodes(op="placeholder")[0].target = "pixels"

    complaint(Rewrite(rename), "the inputs changed from (x: float32[batch, 4]", "to (pixels: float32[batch, 4]")


def test_a_batch_made_constant() -> None:
    def fix(program: Program) -> None:
        after(program, node_of(program, aten.tanh.default), aten.view.default, [3, 6])

    def keep(program: Program) -> None:
        after(program, node_of(program, aten.tanh.default), aten.view.default, [-1, 6])

    message = complaint(Rewrite(fix), "broke the graph at", "a free dimension became 3")
    assert "in module 'body'" in message
    verified(ExactRewrite(keep))


def test_a_batch_made_constant_where_it_is_fixed_anyway() -> None:
    def fix(program: Program) -> None:
        after(program, node_of(program, aten.tanh.default), aten.view.default, [3, 6])

    result = lobo_fx.compile(
        Model(), [ExactRewrite(fix)], example_inputs=(X, torch.ones(3, 2)), dynamic_shapes=None, progress=False
    )
    assert result.module(X, torch.ones(3, 2))["scores"].shape == (3, 5)


def test_shapes_that_no_longer_fit_name_the_users_module() -> None:
    def thin(program: Program, both: bool) -> None:
        up, down = program.module.get_submodule("body.up"), program.module.get_submodule("body.down")
        up.weight, up.bias = nn.Parameter(up.weight[:4]), nn.Parameter(up.bias[:4])  # type: ignore[index]
        if both:
            down.weight = nn.Parameter(down.weight[:, :4])  # type: ignore[index]

    message = complaint(Rewrite(lambda program: thin(program, False)), "broke the graph at aten.linear.default")
    assert "in module 'body.down'" in message
    assert "test_verification.py" in message
    result = verified(Rewrite(lambda program: thin(program, True)))
    assert result.report.rows[-1].parameters == result.report.rows[0].parameters - 2 * 5 - 2 * 5


def test_nan() -> None:
    def spoil(program: Program) -> None:
        after(program, node_of(program, aten.linear.default), aten.log.default)

    def spare(program: Program) -> None:
        after(program, after(program, node_of(program, aten.linear.default), aten.abs.default), aten.log1p.default)

    message = complaint(Rewrite(spoil), "the outputs now hold NaN or infinity, first at aten.log.default")
    assert "in module 'body.up'" in message
    assert "[made by rewrite]" in message
    verified(Rewrite(spare))


def test_nan_from_a_weight() -> None:
    def spoil(program: Program) -> None:
        with torch.no_grad():
            program.module.get_parameter("body.down.weight")[0, 0] = float("nan")

    message = complaint(Rewrite(spoil), "NaN or infinity, first at aten.linear.default in module 'body.down'")
    assert "made by" not in message


def scale(factor: float) -> Change:
    def change(program: Program) -> None:
        after(program, scores_of(program), aten.mul.Tensor, factor)

    return change


def test_a_broken_promise_of_exactness() -> None:
    message = complaint(ExactRewrite(scale(1.01)), "promises exactness", "the outputs moved by 1.0e-02")
    assert "allowed: 1e-04" in message
    assert verified(Rewrite(scale(1.01))).report.rows[-1].snr == pytest.approx(40, abs=0.1)


def test_exactness_is_to_rounding() -> None:
    verified(ExactRewrite(scale(1 + 0.5 * EXACT_TOLERANCE)))
    complaint(ExactRewrite(scale(1 + 2 * EXACT_TOLERANCE)), "promises exactness")


def test_exactness_holds_for_integers_too() -> None:
    def next_best(program: Program) -> None:
        after(program, node_of(program, aten.argmax.default), aten.add.Tensor, 1)

    complaint(ExactRewrite(next_best), "promises exactness")
    verified(Rewrite(next_best))


@dataclasses.dataclass(frozen=True)
class Remove(Pass):
    """Removes the last hidden channels, and says that this equals zeroing the channels from `zeroed` on."""

    zeroed: int

    promise: ClassVar[Promise] = Promise.MASKED

    def run(self, program: Program, context: Context) -> Program:
        body = program.module.get_submodule("body")
        up, down = body.get_submodule("up"), body.get_submodule("down")
        with torch.no_grad():
            whole = program.clone()
            for name in ("weight", "bias"):
                whole.module.get_parameter(f"body.up.{name}")[self.zeroed :] = 0
            context.expect(whole.run())
        up.weight, up.bias = nn.Parameter(up.weight[:4]), nn.Parameter(up.bias[:4])  # type: ignore[index]
        down.weight = nn.Parameter(down.weight[:, :4])  # type: ignore[index]
        return program


def test_a_broken_promise_of_masking() -> None:
    complaint(Remove(zeroed=3), "promises that removing equals zeroing")
    complaint(Remove(zeroed=5), "promises that removing equals zeroing")
    assert verified(Remove(zeroed=4)).report.rows[-1].snr < 60


def test_what_one_pass_expects_is_not_asked_of_the_next() -> None:
    passes = [Remove(zeroed=4), Rewrite(scale(3.0))]
    result = lobo_fx.compile(traced(), passes, progress=False)
    assert len(result.report.rows) == 3


def test_what_a_pass_that_failed_expected_is_not_asked_of_others() -> None:
    @dataclasses.dataclass(frozen=True)
    class Fails(Pass):
        def run(self, program: Program, context: Context) -> Program:
            context.expect(torch.zeros(3, 5))
            raise RuntimeError("it failed")

    pipeline = lobo_fx.compile(traced(), progress=False).pipeline
    assert pipeline is not None
    for tried in (pipeline.fork(), pipeline):
        with pytest.raises(ContractError, match="it failed"):
            tried.run(Fails())
    pipeline.run(Rewrite(scale(3.0)))


class Masked(nn.Module):
    """An output that holds minus infinity on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(x)
        return found.masked_fill(torch.eye(4)[:1].bool(), -torch.inf)


def test_exactness_beside_infinities() -> None:
    def change(program: Program) -> None:
        after(program, node_of(program, aten.linear.default), aten.mul.Tensor, 1.5)

    verified(ExactRewrite(lambda program: None), Masked(), X)
    complaint(ExactRewrite(change), "promises exactness", model=Masked(), example_inputs=X)


def test_nan_beside_infinities() -> None:
    def spoil(program: Program) -> None:
        after(program, node_of(program, aten.linear.default), aten.log.default)

    complaint(Rewrite(spoil), "NaN", model=Masked(), example_inputs=X)


def test_a_malformed_graph() -> None:
    def read_before_written(program: Program) -> None:
        tanh, first = node_of(program, aten.tanh.default), node_of(program, aten.linear.default)
        first.args = (tanh, *first.args[1:])

    complaint(Rewrite(read_before_written), "malformed graph")


def test_a_parameter_that_is_not_there() -> None:
    def delete(program: Program) -> None:
        del program.module.get_submodule("body.up").weight

    complaint(Rewrite(delete), "body.up.weight")


@dataclasses.dataclass(frozen=True)
class Forgetful(Pass):
    """Returns nothing."""

    def run(self, program: Program, context: Context) -> Program:
        return None  # type: ignore[return-value]


def test_a_pass_that_returns_no_program() -> None:
    complaint(Forgetful(), "returned a NoneType")


def test_the_second_of_two_passes_is_named() -> None:
    passes = [ExactRewrite(lambda program: None), Rewrite(lambda program: scale(float("nan"))(program))]
    with pytest.raises(ContractError) as error:
        lobo_fx.compile(traced(), passes, progress=False)
    assert str(error.value).startswith("Rewrite(")


# --- provenance ------------------------------------------------------------------------------------------


def test_new_nodes_know_their_pass_and_the_users_module() -> None:
    result = verified(Rewrite(scale(2.0)))
    new = node_of(result.program, aten.mul.Tensor)
    assert facts_of(new).made_by == "rewrite"
    assert module_name(new) == "body.down"
    assert "test_verification.py" in source_line(new)
    assert facts_of(node_of(result.program, aten.tanh.default)).made_by == ""


def test_errors_have_one_root() -> None:
    assert issubclass(ContractError, LoboError)
    assert issubclass(InvalidInput, LoboError)
    assert issubclass(InvalidInput, ValueError)


# --- models that can't be compiled faithfully ------------------------------------------------------------


def compiled(model: nn.Module, x: torch.Tensor = X) -> lobo_fx.Result:
    return lobo_fx.compile(model, example_inputs=x, progress=False)


def test_nan_in_a_weight_names_the_parameter() -> None:
    model = Body()
    compiled(model)
    with torch.no_grad():
        model.up.bias[2] = float("nan")
    with pytest.raises(InvalidInput, match=r"'up\.bias' holds NaN"):
        compiled(model)


def test_nan_in_a_buffer_names_the_buffer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    compiled(model)
    model[1].running_var[0] = float("nan")  # type: ignore[operator]
    with pytest.raises(InvalidInput, match=r"'1\.running_var' holds NaN"):
        compiled(model)


class Root(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(x)


def test_nan_in_an_activation_names_the_operator_and_the_line() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Root(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.fill_(100)  # type: ignore[operator]
    compiled(model)
    with torch.no_grad():
        model[0].bias.fill_(-100)  # type: ignore[operator]
    with pytest.raises(InvalidInput) as error:
        compiled(model)
    message = str(error.value)
    assert "aten.sqrt.default in module '1'" in message
    assert "return torch.sqrt(x)" in message


def test_infinity_on_purpose_is_fine() -> None:
    result = compiled(Masked())
    assert result.module(X)[0, 0].item() == -torch.inf


def test_the_first_node_that_is_not_finite() -> None:
    clean = lobo_fx.trace(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), X)
    assert first_nonfinite(clean) is None
    model = nn.Sequential(nn.Linear(4, 4), Root(), Root())
    with torch.no_grad():
        model[0].bias.fill_(-100)  # type: ignore[operator]
    found = first_nonfinite(lobo_fx.trace(model, X))
    assert found is not None
    assert module_name(found) == "1"


def test_an_infinite_weight_is_refused_and_an_infinite_mask_is_not() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("mask", torch.tensor([0.0, 0.0, -torch.inf, 0.0]))

        def forward(self, x: torch.Tensor) -> Any:
            return torch.softmax(self.linear(x) + self.mask, 1)

    model = Masked()
    lobo_fx.compile(model, [], example_inputs=torch.randn(2, 4), progress=False)
    with torch.no_grad():
        model.linear.weight[1, 2] = torch.inf
    with pytest.raises(InvalidInput, match=r"'linear\.weight' holds infinity"):
        lobo_fx.compile(model, [], example_inputs=torch.randn(2, 4), progress=False)


@pytest.mark.parametrize(
    "pass_",
    [
        PruneChannels({"u": 0.5}),
        QuantizeStatic(overrides={"u": "float"}),
        MixedPrecision(quantizer=QuantizeStatic(overrides={"u": "float"})),
    ],
    ids=str,
)
def test_what_a_later_pass_refuses_stops_the_first(pass_: Pass) -> None:
    ran: list[Program] = []
    with pytest.raises(InvalidInput, match=r"'u' matches no module.*up"):
        lobo_fx.compile(Body(), [Rewrite(ran.append), pass_], example_inputs=X, calibration_data=[X], progress=False)
    assert not ran
