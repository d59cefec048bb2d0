"""Replaces a call by the calls that compute the same: the decomposition of its operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from lobo_fx.graph.known_shapes import shapes_known
from lobo_fx.graph.provenance import inherit
from lobo_fx.graph.rewriting import replace_results

__all__ = ["decomposition", "put_in_place"]


def decomposition(node: fx.Node, form: Callable[..., Any], table: Mapping[Any, Any] | None = None) -> fx.Graph | None:
    """The graph that a call traces to, with a placeholder for each node that it reads; None if it can't be traced.

    Inputs are traced as contiguous: memory layouts, by which some operators decompose, mean nothing in a file.

    Args:
        node: the call, shapes propagated.
        form: what is traced, called as the node's operator is.
        table: decompositions of operators besides those that PyTorch composes of others (see `make_fx`).
    """
    leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
    sources = node.all_input_nodes

    def call(*values: Any) -> Any:
        known = dict(zip(sources, values, strict=True))
        args, kwargs = pytree.tree_unflatten([known.get(leaf, leaf) for leaf in leaves], structure)
        return form(*args, **kwargs)

    given = [source.meta["val"] for source in sources]
    # the Python forms of composite operators keep sizes symbolic; those of norms need not be run for their shapes
    with torch.no_grad(), shapes_known(), enable_python_dispatcher():
        given = [value.contiguous() if isinstance(value, torch.Tensor) else value for value in given]
        try:
            traced = make_fx(call, dict(table or {}))(*given)
        except Exception:  # a decomposition that fixes a free size, say
            return None
    traced.graph.eliminate_dead_code()
    return None if traced.graph.find_nodes(op="get_attr") else traced.graph


def put_in_place(node: fx.Node, graph: fx.Graph) -> None:
    """Replaces a call by its decomposition, whose nodes get the call's provenance."""
    copies: dict[fx.Node, fx.Node] = dict(zip(graph.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    sources = set(node.all_input_nodes)
    with node.graph.inserting_before(node):
        result = node.graph.graph_copy(graph, copies)
    for copy in copies.values():
        if copy not in sources:
            inherit(copy, node)
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
        node.graph.erase_node(node)
    else:
        replace_results(node, cast("tuple[fx.Node, ...]", result))
