"""Attention as one operator."""

from __future__ import annotations

from lobo_fx.axes.axis import product, total
from lobo_fx.axes.call import Axes, Call, axis_rule
from lobo_fx.graph.operators import aten

__all__ = ["attention"]


@axis_rule(aten.scaled_dot_product_attention.default, zeros="value")
def attention(call: Call) -> Axes:
    """q[… h l e], k[… h s e], v[… h s d] → [… h l d]; grouped queries: h of q = h of k × repeats."""
    q, k, v = call.axes("query"), call.axes("key"), call.axes("value")
    width = call.unify(q[-1], k[-1])
    width.mark("head_dim")
    call.sums(width, call.given["query"], call.given["key"])
    if call.given["scale"] is None:
        call.freeze("scale", float(width.find().size) ** -0.5)
    v[-1].mark("head_dim")
    call.unify(k[-2], v[-2])
    if call.given["enable_gqa"] and len(q) > 2:
        groups = call.unify(k[-3], v[-3])
        size = total([q[-3].find().size])
        repeats = call.fresh(size // groups.find().size)
        heads = call.unify(q[-3], product([groups, repeats]))
        batch = (*call.broadcast([q[:-3], k[:-3], v[:-3]]), heads) if len(q) > 3 else (heads,)
    else:
        batch = call.broadcast([q[:-2], k[:-2], v[:-2]])
    call.multiplies(*q, k[-2])
    call.multiplies(*q[:-1], k[-2], v[-1])
    for axis in batch:
        axis.mark("heads")
    k[-2].lock("attention takes a softmax over it")
    if call.given["is_causal"]:
        q[-2].lock("its positions are compared")
    if call.has("attn_mask"):
        call.broadcast([(*batch, q[-2], k[-2]), call.axes("attn_mask")])
    return (*batch, q[-2], v[-1])
