"""Selects which outputs a program keeps; operators that only the others need are removed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils import _pytree as pytree

from lobo_fx.errors import InvalidInput, suggestion
from lobo_fx.graph.program import Program, seal
from lobo_fx.graph.randomness import drop_dead
from lobo_fx.graph.rewriting import drop_unused

__all__ = ["keep_outputs"]


def keep_outputs(program: Program, names: str | Sequence[str]) -> Program:
    """A program that returns some of the outputs and does not compute the others.

    Containers keep their types. A dict (such as a `ModelOutput`) holds only the chosen entries; in tuples, lists and
    other types the others are None, so that every output keeps its place and its name. Inputs stay.

    Args:
        program: not changed; the returned program shares its weights.
        names: names of outputs, as in `program.signature.outputs` and exported files (`logits`, `output_0`), or of
            containers of outputs (`hidden_states` stands for `hidden_states.0`, `hidden_states.1` and so on).

    Raises:
        InvalidInput: no name is given, no output has one of the names, or the container requires another output.
    """
    known = [spec.name if spec else "" for spec in program.signature.outputs]
    chosen = _chosen([names] if isinstance(names, str) else names, known)
    module = copy.copy(program.module)
    codegen: Any = module.graph._codegen
    output = module.graph.output_node()
    flat = [leaf if place in chosen else None for place, leaf in enumerate(pytree.tree_leaves(output.args[0]))]
    left, structure = _shrunk(flat, codegen.pytree_info.out_spec)
    output.args = (tuple(left),)
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=structure)
    drop_dead(module.graph)
    kept = Program(module, program.example_inputs)
    drop_unused(kept, [name for name, _ in [*module.named_parameters(), *module.named_buffers()]])
    module.recompile()
    seal(module)
    return kept


def _chosen(names: Sequence[str], known: Sequence[str]) -> set[int]:
    """Indices of the named outputs.

    Raises:
        InvalidInput: no name is given, or no output has one of the names.
    """
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise InvalidInput(f"outputs is {names!r}; expected names of outputs: {', '.join(filter(None, known))}")
    chosen: set[int] = set()
    for name in names:
        places = {place for place, output in enumerate(known) if output and f"{output}.".startswith(f"{name}.")}
        if not places:
            raise InvalidInput(f"the model has no output '{name}'; {suggestion(name, known)}")
        chosen |= places
    return chosen


def _shrunk(leaves: list[Any], structure: pytree.TreeSpec) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves (None where not chosen) and their structure, without dict entries that hold nothing chosen.

    A container that holds nothing chosen becomes a single None, unless a dict holds it.
    """
    if structure.is_leaf():
        return leaves, structure
    parts: list[tuple[list[Any], pytree.TreeSpec]] = []
    for child in structure.children():
        below, leaves = leaves[: child.num_leaves], leaves[child.num_leaves :]
        held = any(leaf is not None for leaf in below)
        parts.append(_shrunk(below, child) if held else ([None], pytree.treespec_leaf()))
    whole = pytree.TreeSpec(structure.type, structure.context, [part for _, part in parts])
    if isinstance(whole.type, type) and issubclass(whole.type, Mapping) and isinstance(whole.context, list):
        held_at = [place for place, (below, _) in enumerate(parts) if below != [None]]
        whole = pytree.TreeSpec(whole.type, [whole.context[n] for n in held_at], [parts[n][1] for n in held_at])
        parts = [parts[n] for n in held_at]
        _check_builds(whole)
    return [leaf for below, _ in parts for leaf in below], whole


def _check_builds(structure: pytree.TreeSpec) -> None:
    """Refuses to leave out an entry that its container requires.

    Raises:
        InvalidInput: quotes the error of the container's type.
    """
    try:
        pytree.tree_unflatten([0] * structure.num_leaves, structure)
    except Exception as error:
        kept = ", ".join(map(str, structure.context))
        raise InvalidInput(
            f"a {structure.type.__name__} can't hold {kept} alone: {error}; keep that output too"
        ) from None
