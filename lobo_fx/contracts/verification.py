"""The verifier: a table of checks that must hold after every pass, and the error where one does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise, exact_tolerance
from lobo_fx.errors import ContractError, InvalidInput
from lobo_fx.graph.node_facts import facts_of, mark
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import describe
from lobo_fx.graph.randomness import Draw, drawing, drawn
from lobo_fx.graph.running import Runner
from lobo_fx.graph.shapes import PropagationError, propagate
from lobo_fx.graph.signature import Signature
from lobo_fx.measures.counts import run_counted
from lobo_fx.measures.fidelity import float_outputs, largest_error

__all__ = [
    "CHECKS",
    "Evidence",
    "Snapshot",
    "check_expected",
    "check_finite",
    "check_inputs_unchanged",
    "check_model",
    "check_outputs_unchanged",
    "check_promise",
    "check_runs",
    "first_nonfinite",
    "snapshot",
    "tag",
    "verify",
]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What is kept of a program to compare the next one with."""

    signature: Signature
    outputs: Any
    macs: int | None
    drawn: tuple[Draw, ...]


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A rewritten program, with a snapshot of the program before."""

    pass_: Pass
    before: Snapshot
    program: Program
    after: Snapshot
    expected: list[Any]


def snapshot(program: Program) -> Snapshot:
    """Runs the program on its example inputs, and records the outputs."""
    outputs, macs = run_counted(program)
    return Snapshot(program.signature, outputs, macs, drawn(program.module))


def check_inputs_unchanged(evidence: Evidence) -> str | None:
    """Inputs keep names, order, dtypes and shapes."""
    before, after = evidence.before.signature, evidence.after.signature
    if (before.names, before.positional, before.inputs) == (after.names, after.positional, after.inputs):
        return None
    if before.inputs == after.inputs:
        return f"the arguments of a call changed from ({_arguments(before)}) to ({_arguments(after)})"
    return f"the inputs changed from ({before}) to ({after})"


def _arguments(signature: Signature) -> str:
    """Their names as Python writes them: after the star those that are given by name alone."""
    by_position, by_name = signature.names[: signature.positional], signature.names[signature.positional :]
    return ", ".join([*by_position, *["*"] * bool(by_name), *by_name])


def check_outputs_unchanged(evidence: Evidence) -> str | None:
    """Outputs keep their structure, dtypes and shapes."""
    before, after = evidence.before.signature, evidence.after.signature
    if before.structure != after.structure:
        return f"the output structure changed from {before.structure} to {after.structure}"
    for old, new in zip(before.outputs, after.outputs, strict=True):
        if old != new:
            return f"an output changed from {old} to {new}"
    return None


def check_finite(evidence: Evidence) -> str | None:
    """Outputs hold no NaN or infinity that was not there before."""
    pairs = zip(float_outputs(evidence.before.outputs), float_outputs(evidence.after.outputs), strict=True)
    if all(bool((new.isfinite() | (~old.isfinite() & ~new.isnan()) | old.isnan()).all()) for old, new in pairs):
        return None
    node = first_nonfinite(evidence.program)
    where = f", first at {describe(node)}" if node else ""
    return f"the outputs now hold NaN or infinity{where}"


def check_promise(evidence: Evidence) -> str | None:
    """The outputs after an exact pass are those before; after a masked pass, those it expected; up to rounding.

    Skipped where the programs draw different random numbers, as their outputs can't be compared.
    """
    if evidence.before.drawn != evidence.after.drawn:
        return None
    exact = evidence.pass_.promise is Promise.EXACT
    expected = [evidence.before.outputs] if exact else evidence.expected
    error = max((largest_error(outputs, evidence.after.outputs) for outputs in expected), default=0.0)
    allowed = exact_tolerance(evidence.before.outputs)
    if error <= allowed:
        return None
    promise = "exactness" if exact else "that removing equals zeroing"
    return f"it promises {promise}, but the outputs moved by {error:.1e} of their range (allowed: {allowed:.0e})"


CHECKS: tuple[Callable[[Evidence], str | None], ...] = (
    check_inputs_unchanged,
    check_outputs_unchanged,
    check_finite,
    check_promise,
)


def verify(pass_: Pass, before: Snapshot, program: Program, context: Context) -> Snapshot:
    """Checks the program that `pass_` returned.

    Raises:
        ContractError: names the pass, what is wrong, and where.
    """
    tag(program.graph, pass_.name)
    try:
        program.graph.lint()
        program.module.recompile()
        propagate(program.module)
    except PropagationError as error:
        raise ContractError(f"{pass_} broke the graph at {describe(error.node)}: {error.reason}") from error
    except Exception as error:
        raise ContractError(f"{pass_} left a malformed graph: {error}") from error
    try:
        after = snapshot(program)
    except Exception as error:
        raise ContractError(f"{pass_} left a program that does not run: {error}") from error
    evidence = Evidence(pass_, before, program, after, context.expected)
    for check in CHECKS:
        if complaint := check(evidence):
            raise ContractError(f"{pass_} broke its contract: {complaint}")
    if before.drawn != after.drawn:
        _note_other_draws(program, context)
    return after


def check_expected(pass_: Pass, program: Program, context: Context) -> None:
    """Compares a program with the outputs that a pass expected, before the pass changes them on purpose.

    Args:
        pass_: the pass, for messages.
        program: the program as it is now.
        context: holds the expected outputs, which are cleared.

    Raises:
        ContractError: removing differs from zeroing.
    """
    outputs = program.run()
    for expected in context.expected:
        error = largest_error(expected, outputs)
        if error > exact_tolerance(outputs):
            raise ContractError(f"{pass_}: removing differs from zeroing by {error:.1e} of the output range")
    context.expected.clear()


def _note_other_draws(program: Program, context: Context) -> None:
    """Notes that outputs before and after the pass can't be compared."""
    reason = (
        "draws other random numbers than before this pass, so the outputs could not be compared with those before, "
        "and the signal-to-noise ratio counts the difference of the draws"
    )
    for node in (operators := drawing(program.module)):
        context.note(reason, node)
    if not operators:
        context.note(f"the program {reason}")


def tag(graph: fx.Graph, pass_: str) -> None:
    """Marks every new node with the pass that made it, and gives it the module of a neighbour."""
    for node in graph.nodes:
        if facts_of(node).made_by is None:
            mark(node, made_by=pass_)
        if node.op != "call_function" or facts_of(node).made_by != pass_:
            continue
        if "nn_module_stack" not in node.meta:
            sources = [n.meta for n in [*node.all_input_nodes, *node.users] if n.meta.get("nn_module_stack")]
            if sources:
                node.meta["nn_module_stack"] = sources[0]["nn_module_stack"]
                node.meta.setdefault("stack_trace", sources[0].get("stack_trace"))


def check_model(program: Program) -> None:
    """Refuses a model that can't be compiled faithfully: NaN or infinite weights or activations.

    Raises:
        InvalidInput: names the parameter, or the first operator with such an output; or as `check_runs`.
    """
    for name, tensor in [*program.module.named_parameters(), *program.module.named_buffers()]:
        infinite = isinstance(tensor, nn.Parameter) and bool(tensor.isinf().any())  # a buffer may mask with infinity
        if tensor.is_floating_point() and (infinite or bool(tensor.isnan().any())):
            word = "infinity" if infinite else "NaN"
            raise InvalidInput(f"the model's '{name}' holds {word}; load or train the weights first")
    if any(bool(output.isnan().any()) for output in float_outputs(check_runs(program))):
        node = first_nonfinite(program)
        where = f": {describe(node)} is the first to give NaN or infinity" if node else ""
        raise InvalidInput(f"the model gives NaN on the example inputs{where}")


def check_runs(program: Program) -> Any:
    """Runs the example inputs, and returns the outputs: tracing looks at shapes, and not at all that kernels look at.

    Raises:
        InvalidInput: the model does not run on them; they are of a wrong type, for instance.
    """
    try:
        return program.run()
    except Exception as error:
        given = ", ".join(str(spec) for spec in program.signature.inputs if spec is not None)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidInput(f"the model does not run on its example inputs ({given}): {reason}") from error


def first_nonfinite(program: Program) -> fx.Node | None:
    """The first operator whose output on the example inputs holds NaN or infinity."""
    found: list[fx.Node] = []

    def see(node: fx.Node, value: Any) -> None:
        if not found and node.op == "call_function" and any(not bool(t.isfinite().all()) for t in float_outputs(value)):
            found.append(node)

    Runner(program.module, see)(program.example_inputs)
    return found[0] if found else None
