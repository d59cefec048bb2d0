"""Names of inputs, outputs and free dimensions, as exported files have them."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping

from lobo_fx.errors import InvalidInput, suggestion
from lobo_fx.graph.program import Program, seal

__all__ = ["name_values"]

_NAME = re.compile(r"[A-Za-z_][\w.\-/]*")


def name_values(program: Program, names: Mapping[str, str]) -> Program:
    """Renames inputs, outputs and free dimensions in exported files; `forward` is still called as before.

    Args:
        program: not changed; the returned program shares its weights.
        names: new names, by the default names in files (`input`, `output_0`, `logits`, `batch`).

    Raises:
        InvalidInput: nothing has such a name, a new name is invalid, or two names would be the same.
    """
    if not isinstance(names, Mapping) or not all(isinstance(text, str) for pair in names.items() for text in pair):
        raise InvalidInput(f"names is {names!r}; expected new names by old ones, as {{'output_0': 'boxes'}}")
    signature, facts = program.signature, program.module.program_facts
    values = [spec.name for spec in (*signature.inputs, *signature.outputs) if spec]
    sizes = [dimension.name for dimension in signature.free]
    for old, new in names.items():
        if old not in (*values, *sizes):
            raise InvalidInput(
                f"names: no input, output or free dimension '{old}'; {suggestion(old, [*values, *sizes])}"
            )
        if not _NAME.fullmatch(new) or (old in sizes and not new.isidentifier()):
            raise InvalidInput(
                f"names: '{old}' can't be called {new!r}: letters, digits and underscores, no digit first"
            )
    for group in (values, sizes):
        named = [names.get(name, name) for name in group]
        if twice := sorted({name for name in named if named.count(name) > 1}):
            raise InvalidInput(f"names: two would be called '{twice[0]}'")
    module = copy.copy(program.module)
    free = [
        dataclasses.replace(dimension, name=names.get(shown.name, dimension.name))
        for dimension, shown in zip(facts.free_dimensions, signature.free, strict=True)
    ]
    before = {new: old for old, new in facts.names.items()}
    own = {before.get(old, old): new for old, new in names.items() if old in values}
    module.set_facts(free_dimensions=tuple(free), names={**facts.names, **own})
    seal(module)
    return Program(module, program.example_inputs)
