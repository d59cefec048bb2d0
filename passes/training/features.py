"""Shows values inside of a network: features and attention maps of modules, by name."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import fx, nn

from lobo_fx.errors import InvalidInput, suggestion
from lobo_fx.graph.operators import arguments, aten
from lobo_fx.graph.program import ProgramModule
from lobo_fx.graph.provenance import module_name

__all__ = ["Place", "Seen", "attention_maps", "output_nodes", "seeing"]

Place = tuple[Literal["features", "attention"], str]
"""Which value of a module is seen, its outputs or its attention map, and the module's name."""
Seen = dict[Place, torch.Tensor]
"""The values of the last call, by place."""
_ATTENTION = aten.scaled_dot_product_attention.default


class _Tap(nn.Module):
    """Keeps the value that flows through it; the graph goes on without it."""

    def __init__(self, place: Place, seen: Seen) -> None:
        super().__init__()
        self.place, self.seen = place, seen

    def forward(self, value: torch.Tensor) -> None:
        self.seen[self.place] = value


class _AttentionTap(_Tap):
    """Keeps the attention that queries pay to keys, averaged over heads, of which networks may have different numbers.

    Source: the maps that Jiao et al., "TinyBERT", 2020, section 3.1, compare; they compare them before the softmax.
    """

    def forward(  # type: ignore[override]
        self,
        query: torch.Tensor,  # [... heads, queries, head_dim]
        key: torch.Tensor,
        mask: torch.Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
    ) -> None:
        groups = query.shape[-3] // key.shape[-3] if query.dim() > 3 else 1
        scores = query @ key.repeat_interleave(groups, -3).mT * (scale or 1 / math.sqrt(query.shape[-1]))
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        lowest = torch.finfo(scores.dtype).min  # minus infinity gives NaN where a query may look nowhere
        if mask is not None:
            scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask.clamp_min(lowest)
        maps = scores.softmax(-1)
        self.seen[self.place] = maps.mean(-3) if maps.dim() > 3 else maps


@contextlib.contextmanager
def seeing(module: nn.Module, places: Sequence[Place]) -> Iterator[tuple[nn.Module, Seen]]:
    """A module that computes the same with the same parameters, and the values inside that every call shows.

    Args:
        module: a program's module, or any other.
        places: what to look at.

    Raises:
        InvalidInput: a place names no module, or a value that can't be seen.
    """
    seen: Seen = {}
    if isinstance(module, ProgramModule):
        yield _tapped(module, places, seen), seen
        return
    modules = dict(module.named_modules())
    hooks = []
    try:
        for what, name in dict.fromkeys(places):
            if name not in modules:
                raise InvalidInput(f"the teacher has no module '{name}'; {suggestion(name, modules)}")
            if what != "features":
                raise InvalidInput(
                    "attention maps of a module are not known; give a traced teacher: lobo_fx.compile(teacher)"
                )
            hooks.append(modules[name].register_forward_hook(_hook(name, seen)))
        yield module, seen
    finally:
        for hook in hooks:
            hook.remove()


def _hook(name: str, seen: Seen):  # type: ignore[no-untyped-def]
    def keep(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, (tuple, list)):
            output = output[0]
        if not isinstance(output, torch.Tensor):
            raise InvalidInput(f"module '{name}' gives a {type(output).__name__}; features are tensors")
        seen["features", name] = output

    return keep


def _tapped(module: ProgramModule, places: Sequence[Place], seen: Seen) -> nn.Module:
    tapped = copy.copy(module)
    outputs = output_nodes(tapped.graph)
    attentions = attention_maps(tapped.graph)
    for index, (what, name) in enumerate(places):
        known = outputs if what == "features" else attentions
        if name not in known:
            kind = "module" if what == "features" else "module with an attention"
            raise InvalidInput(f"there is no {kind} '{name}'; {suggestion(name, known)}")
        node = known[name]
        args: tuple[Any, ...] = (node,)
        if what == "attention":
            given = arguments(node)
            args = (given["query"], given["key"], given["attn_mask"], given["is_causal"], given["scale"])
        tap = f"_tap_{index}"
        tapped.add_submodule(tap, (_Tap if what == "features" else _AttentionTap)((what, name), seen))
        with tapped.graph.inserting_after(node):
            tapped.graph.call_module(tap, args)
    tapped.recompile()
    return tapped


def output_nodes(graph: fx.Graph) -> dict[str, fx.Node]:
    """The last float tensor that was computed in each module, by the module's name."""
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        parts = module_name(node).split(".")
        for end in range(1, len(parts) + 1):
            found[".".join(parts[:end])] = node
    found.pop("", None)
    return found


def attention_maps(graph: fx.Graph) -> dict[str, fx.Node]:
    """The fused attention in each module, by the module's name."""
    return {module_name(node): node for node in graph.find_nodes(op="call_function", target=_ATTENTION)}
