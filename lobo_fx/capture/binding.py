"""How example inputs bind to a model's `forward`."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from lobo_fx.errors import InvalidInput
from lobo_fx.graph.inputs import HOW_TO_PASS, Inputs

__all__ = ["check_arity", "gathered_named", "in_order"]


def check_arity(model: nn.Module, inputs: Inputs) -> None:
    """Refuses inputs that the model's forward can't bind, before tracing.

    Raises:
        InvalidInput: too many, too few or unknown inputs.
    """
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise InvalidInput(
            f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}. {HOW_TO_PASS}"
        ) from None


def in_order(model: nn.Module, inputs: Inputs) -> Inputs:
    """Keyword inputs in the order of the model's forward."""
    known = list(inspect.signature(model.forward).parameters)
    place = {name: index for index, name in enumerate(known)}
    names = sorted(inputs.kwargs, key=lambda name: place.get(name, len(known)))
    return Inputs(inputs.args, {name: inputs.kwargs[name] for name in names})


@contextlib.contextmanager
def gathered_named(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Makes `forward(**kwargs)` name the given inputs in its signature within this context.

    `torch.export` leaves no dimension free for inputs that the signature of `forward` does not name.
    """
    forward, before = model.forward, vars(model).get("forward")
    signature = inspect.signature(forward)
    stated = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    if len(stated) == len(signature.parameters):
        yield
        return

    @functools.wraps(forward)
    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    gathered = [name for name in inputs.kwargs if name not in signature.parameters]
    stated += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in gathered]
    named.__signature__ = signature.replace(parameters=stated)  # type: ignore[attr-defined]
    model.forward = named
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before
