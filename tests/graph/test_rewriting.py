"""The pattern helper: what matches, what is left alone and why, and what new nodes inherit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from lobo_fx.capture.tracing import trace
from lobo_fx.graph.masks import mask_weight
from lobo_fx.graph.operators import arguments, aten, set_argument
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import describe, inherit, module_name, source_line
from lobo_fx.graph.rewriting import Match, Op, Rejected, add_parameter, drop_unused, free_name, rewrite

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    def __init__(self, body: Callable[[Model, torch.Tensor], object]) -> None:
        super().__init__()
        self.body = body
        self.linear = nn.Linear(3, 3)
        self.other = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> object:
        return self.body(self, x)


def program_of(body: Callable[[Model, torch.Tensor], object]) -> Program:
    return trace(Model(body).eval(), X).clone()


def operators(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def matches_of(program: Program, pattern: Op) -> list[Match]:
    """Where the pattern is found; the graph is left as it is."""
    found: list[Match] = []

    def rule(match: Match) -> fx.Node:
        found.append(match)
        return match.root

    assert rewrite(program, pattern, rule) == []
    return found


TWICE = Op(aten.relu.default, Op(aten.relu.default, name="inner"), name="outer")


def keep_inner(match: Match) -> fx.Node:
    return match["inner"]


# --- matching --------------------------------------------------------------------------------------------


def test_a_match_is_replaced_and_dead_nodes_go() -> None:
    program = program_of(lambda model, x: torch.relu(torch.relu(model.linear(x))) + 1)
    before = program.run()
    assert rewrite(program, TWICE, keep_inner) == []
    assert operators(program) == ["aten.linear.default", "aten.relu.default", "aten.add.Tensor"]
    assert torch.equal(program.run(), before)


def test_matches_that_overlap_are_found_in_graph_order() -> None:
    program = program_of(lambda model, x: torch.relu(torch.relu(torch.relu(torch.relu(x)))))
    rewrite(program, TWICE, keep_inner)
    assert operators(program) == ["aten.relu.default"]
    assert torch.equal(program.run(), X.relu())


UNMATCHED: dict[str, Callable[[Model, torch.Tensor], object]] = {
    "one operator": lambda model, x: torch.relu(x),
    "another operator inside": lambda model, x: torch.relu(torch.sigmoid(x)),
    "another operator outside": lambda model, x: torch.sigmoid(torch.relu(x)),
    "one between": lambda model, x: torch.relu(torch.relu(x) - 1),
    "the inner one is needed elsewhere": lambda model, x: (lambda y: torch.relu(y) + y)(torch.relu(x)),
    "the inner one is an output": lambda model, x: (lambda y: (torch.relu(y), y))(torch.relu(x)),
}


@pytest.mark.parametrize("name", UNMATCHED)
def test_what_looks_alike_is_left_alone(name: str) -> None:
    program = program_of(UNMATCHED[name])
    before = operators(program)
    assert matches_of(program, TWICE) == []
    assert rewrite(program, TWICE, keep_inner) == []
    assert operators(program) == before


def test_a_shared_inner_node_matches_where_the_pattern_allows_it() -> None:
    program = program_of(UNMATCHED["the inner one is needed elsewhere"])
    before = program.run()
    pattern = Op(aten.relu.default, Op(aten.relu.default, name="inner", shared=True))
    rewrite(program, pattern, keep_inner)
    assert operators(program) == ["aten.relu.default", "aten.add.Tensor"]
    assert torch.equal(program.run(), before)


def test_the_root_may_have_many_users() -> None:
    program = program_of(lambda model, x: (lambda y: (y + 1, y * 2))(torch.relu(torch.relu(x))))
    rewrite(program, TWICE, keep_inner)
    assert operators(program).count("aten.relu.default") == 1
    a, b = program.run()
    assert torch.equal(a, X.relu() + 1)
    assert torch.equal(b, X.relu() * 2)


@pytest.mark.parametrize("targets", [[aten.relu.default, aten.sigmoid.default], {aten.sigmoid.default}])
def test_one_of_several_operators(targets: object) -> None:
    program = program_of(lambda model, x: torch.sigmoid(x) + 1)
    (match,) = matches_of(program, Op(targets, name="op"))
    assert match["op"].target == aten.sigmoid.default


def test_an_argument_that_matters_not() -> None:
    second = Op(aten.sub.Tensor, None, Op(aten.relu.default, name="inner"))
    for body, count in (
        (lambda model, x: x - torch.relu(x), 1),
        (lambda model, x: torch.relu(x) - x, 0),
        (lambda model, x: x - 1, 0),
    ):
        assert len(matches_of(program_of(body), second)) == count


def test_a_keyword_argument_matches_as_a_positional_one_does() -> None:
    program = program_of(lambda model, x: torch.relu(model.linear(x)))
    (linear,) = program.graph.find_nodes(op="call_function", target=aten.linear.default)
    source, weight, bias = linear.args
    linear.args, linear.kwargs = (), {"input": source, "weight": weight, "bias": bias}
    program.module.recompile()
    pattern = Op(aten.relu.default, Op(aten.linear.default, None, None, None, name="linear"))
    (match,) = matches_of(program, pattern)
    assert match.arguments("linear")["weight"] is weight


def test_a_pattern_with_more_inputs_than_the_operator_has() -> None:
    program = program_of(lambda model, x: torch.relu(x))
    assert matches_of(program, Op(aten.relu.default, None, None)) == []
    assert len(matches_of(program, Op(aten.relu.default, None))) == 1


def test_arguments_come_with_their_defaults() -> None:
    program = program_of(lambda model, x: x + 1)
    (node,) = program.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    match = Match(node, {"sum": node})
    assert match["sum"] is node
    assert match.arguments("sum") == {"self": node.args[0], "other": 1, "alpha": 1}


# --- replacing -------------------------------------------------------------------------------------------


def test_a_replacement_may_use_the_node_it_replaces() -> None:
    program = program_of(lambda model, x: torch.relu(x) * 3)

    def negate(match: Match) -> fx.Node:
        with program.graph.inserting_after(match.root):
            return program.graph.call_function(aten.neg.default, (match.root,))

    rewrite(program, Op(aten.relu.default), negate)
    assert operators(program) == ["aten.relu.default", "aten.neg.default", "aten.mul.Tensor"]
    assert torch.equal(program.run(), -X.relu() * 3)


def test_new_nodes_go_before_the_root() -> None:
    program = program_of(lambda model, x: torch.relu(x) + 1)

    def rule(match: Match) -> fx.Node:
        return program.graph.call_function(aten.sigmoid.default, match.root.args)

    rewrite(program, Op(aten.relu.default), rule)
    assert operators(program) == ["aten.sigmoid.default", "aten.add.Tensor"]
    assert torch.equal(program.run(), X.sigmoid() + 1)


def test_new_nodes_inherit_module_and_line() -> None:
    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(x)

    program = trace(nn.Sequential(nn.Linear(3, 3), Inner()), X).clone()
    (relu,) = program.graph.find_nodes(op="call_function", target=aten.relu.default)
    module, line = module_name(relu), source_line(relu)
    assert module == "1"
    assert "test_rewriting.py" in line
    assert line.endswith("return F.relu(x)")

    def rule(match: Match) -> fx.Node:
        doubled = program.graph.call_function(aten.mul.Tensor, (match.root.args[0], 2))
        return program.graph.call_function(aten.sigmoid.default, (doubled,))

    rewrite(program, Op(aten.relu.default), rule)
    for target in (aten.mul.Tensor, aten.sigmoid.default):
        (new,) = program.graph.find_nodes(op="call_function", target=target)
        assert (module_name(new), source_line(new)) == (module, line)
    (linear,) = program.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert module_name(linear) == "0"


def test_what_a_node_knows_of_itself_is_kept() -> None:
    graph = fx.Graph()
    old, new = graph.placeholder("a"), graph.placeholder("b")
    old.meta.update(stack_trace="old", nn_module_stack={"k": ("a.b", "M")}, val=3)
    new.meta["stack_trace"] = "new"
    inherit(new, old)
    assert new.meta == {"stack_trace": "new", "nn_module_stack": {"k": ("a.b", "M")}}


# --- turning a match down --------------------------------------------------------------------------------


def test_a_match_turned_down_changes_nothing_and_says_why() -> None:
    program = program_of(lambda model, x: torch.relu(torch.relu(model.linear(x))))
    before = operators(program)
    (rejected,) = rewrite(program, TWICE, lambda match: Rejected(match["inner"], "it is dear to me"))
    assert operators(program) == before
    assert rejected.reason == "it is dear to me"
    text = str(rejected)
    assert text == f"{describe(rejected.node)} left alone: it is dear to me"
    assert text.startswith("aten.relu.default (")
    assert "test_rewriting.py" in text


def test_some_are_turned_down_and_others_not() -> None:
    program = program_of(lambda model, x: torch.relu(x) + torch.relu(x * 2))
    first = program.graph.find_nodes(op="call_function", target=aten.relu.default)[0]

    def rule(match: Match) -> fx.Node | Rejected:
        if match.root is first:
            return Rejected(match.root, "the first")
        return program.graph.call_function(aten.sigmoid.default, match.root.args)

    rejected = rewrite(program, Op(aten.relu.default), rule)
    assert [entry.node for entry in rejected] == [first]
    assert torch.equal(program.run(), X.relu() + (X * 2).sigmoid())


# --- parameters ------------------------------------------------------------------------------------------


def test_a_parameter_is_added_under_its_name() -> None:
    program = program_of(lambda model, x: model.linear(x))

    def rule(match: Match) -> fx.Node:
        scale = add_parameter(program, "linear.scale", nn.Parameter(torch.full((3,), 2.0)))
        set_argument(match.root, "bias", scale)
        return match.root

    weight = program.module.get_parameter("linear.weight")
    rewrite(program, Op(aten.linear.default), rule)
    assert torch.equal(program.run(), F.linear(X, weight, torch.full((3,), 2.0)))
    assert program.module.get_parameter("linear.scale").requires_grad
    assert "linear.scale" in program.clone().module.state_dict()


def test_only_what_nobody_reads_is_dropped() -> None:
    program = program_of(lambda model, x: model.linear(x) + model.other(x))
    first = program.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
    set_argument(first, "bias", None)
    program.graph.eliminate_dead_code()
    program.module.recompile()
    drop_unused(program, ["linear.bias", "other.bias"])
    assert sorted(program.module.state_dict()) == ["linear.weight", "other.bias", "other.weight"]
    assert torch.isfinite(program.run()).all()


def test_a_masked_weight_is_still_matched() -> None:
    program = program_of(lambda model, x: torch.relu(model.linear(x)))
    mask_weight(program, "linear.weight", torch.eye(3, dtype=torch.bool))
    pattern = Op(aten.relu.default, Op(aten.linear.default, None, Op(aten.mul.Tensor), name="linear"))
    assert len(matches_of(program, pattern)) == 1
    assert matches_of(program_of(lambda model, x: torch.relu(model.linear(x))), pattern) == []


# --- arguments by name -----------------------------------------------------------------------------------


def test_an_argument_is_set_wherever_it_stands() -> None:
    program = trace(nn.Conv2d(1, 1, 3), torch.randn(2, 1, 6, 6)).clone()
    (conv,) = program.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    set_argument(conv, "padding", [1, 1])
    assert list(arguments(conv)["padding"]) == [1, 1]
    assert list(arguments(conv)["stride"]) in ([1], [1, 1])
    program.module.recompile()
    assert program.run().shape == (2, 1, 6, 6)
    weight = conv.args[1]
    conv.args, conv.kwargs = conv.args[:1], {"weight": weight}
    set_argument(conv, "weight", weight)
    assert conv.kwargs == {"weight": weight}
    assert len(conv.args) == 1


def test_no_name_of_a_tied_parameter_is_free() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        return model.other(model.linear(x))  # type: ignore[no-any-return]

    model = Model(body)
    model.other.weight = model.linear.weight
    program = trace(model.eval(), X).clone()
    assert free_name(program, "linear.weight") == "linear.weight_1"
    assert free_name(program, "other.weight") == "other.weight_1"
    assert free_name(program, "other") == "other_1"
    assert free_name(program, "third.weight") == "third.weight"
