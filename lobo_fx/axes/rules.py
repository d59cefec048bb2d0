"""The table of axis rules, families first. Each rule's docstring is its algebra."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from lobo_fx.axes.algebra import Axis, AxisError, Size, concatenation, cut, product, total
from lobo_fx.axes.inference import Axes, Call, axis_rule, pointwise, sizes_of
from lobo_fx.operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, aten

# --- families ----------------------------------------------------------------------------------------------

# Element by element, though not tagged so, or with arguments that are no tensors.
POINTWISE = (
    *(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default),
    *(aten.feature_alpha_dropout.default, aten.clone.default, aten.contiguous.default, aten.to.dtype),
    *(aten.to.dtype_layout, aten.to.device, aten.detach.default),
    *(aten.alias.default, aten.rrelu.default, aten.zeros_like.default, aten.ones_like.default),
    *(aten.full_like.default, aten.empty_like.default, aten.relu6.default, aten._to_copy.default),
    *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.ScalarOther, aten.where.ScalarSelf),
    *(aten.where.Scalar, aten.hardswish.default, aten.hardsigmoid.default, aten.selu.default, aten.celu.default),
    *(aten.mish.default, aten.softplus.default, aten.copy.default, aten.fill.Scalar, aten.fill.Tensor),
    *(aten.square.default, aten.lift_fresh.default, aten.__and__.Tensor, aten.__or__.Tensor),
    *(aten.true_divide.Tensor, aten.float_power.Tensor_Scalar, aten.floor_divide.default),
    *(aten.expand_as.default, aten.nan_to_num.default, aten.log_sigmoid.default),
)


def _overloads(items: Sequence[Any]) -> list[Any]:
    return [item for item in items if isinstance(item, torch._ops.OpOverload)]


axis_rule(*dict.fromkeys(_overloads(POINTWISE)))(pointwise)
_CONSTANTS = frozenset({aten.zeros_like.default, aten.ones_like.default, aten.full_like.default})


@axis_rule(aten.to.other, aten.type_as.default)
def converted(call: Call) -> Axes:
    """Only the dtype comes from the other tensor."""
    return call.axes("self")


@axis_rule(operator.getitem)
def getitem(call: Call) -> Any:
    """The axes of one of several results."""
    source, index = call.node.args
    assert isinstance(source, fx.Node)
    assert isinstance(index, int)
    return call.inference.values[source][index]


# --- contractions ------------------------------------------------------------------------------------------


def contraction(signature: str, *names: str) -> Callable[[Call], Axes]:
    """A rule from a signature such as "m k, k n -> m n": equal letters are one axis, `...` is broadcast."""
    left, right = signature.split("->")
    inputs = [term.split() for term in left.split(",")]
    output = right.split()

    def rule(call: Call) -> Axes:
        letters: dict[str, Axis] = {}
        rest: list[Axes] = []
        for name, letter_names in zip(names, inputs, strict=True):
            if not call.has(name):
                continue
            axes = call.axes(name)
            count = len(letter_names) - ("..." in letter_names)
            if "..." in letter_names:
                rest.append(axes[: len(axes) - count])
            for letter, axis in zip(letter_names[len(letter_names) - count :], axes[len(axes) - count :], strict=True):
                letters[letter] = call.unify(letters[letter], axis) if letter in letters else axis
        batch = call.inference.broadcast(call.node, rest) if rest else ()
        operands = [call.given[name] for name, term in zip(names, inputs, strict=True) if len(term) > 1]
        for letter, axis in letters.items():
            if letter not in output:
                call.sums(axis, *operands)
        return (*batch, *(letters[letter] for letter in output if letter != "..."))

    rule.__doc__ = signature
    return rule


axis_rule(aten.linear.default)(contraction("... k, n k, n -> ... n", "input", "weight", "bias"))
axis_rule(aten.mm.default)(contraction("m k, k n -> m n", "self", "mat2"))
axis_rule(aten.bmm.default)(contraction("b m k, b k n -> b m n", "self", "mat2"))
axis_rule(aten.dot.default)(contraction("k, k ->", "self", "tensor"))
axis_rule(aten.mv.default)(contraction("m k, k -> m", "self", "vec"))
axis_rule(aten.outer.default)(contraction("m, n -> m n", "self", "vec2"))


@axis_rule(aten.addmm.default)
def addmm(call: Call) -> Axes:
    """Self + mat1 · mat2, self broadcast."""
    result = contraction("m k, k n -> m n", "mat1", "mat2")(call)
    return call.inference.broadcast(call.node, [result, call.axes("self")])


@axis_rule(aten.baddbmm.default)
def baddbmm(call: Call) -> Axes:
    """Self + batch1 · batch2, self broadcast."""
    result = contraction("b m k, b k n -> b m n", "batch1", "batch2")(call)
    return call.inference.broadcast(call.node, [result, call.axes("self")])


@axis_rule(aten.matmul.default)
def matmul(call: Call) -> Axes:
    """The last dimension of one with the last but one of the other; the rest is broadcast."""
    a, b = call.axes("self"), call.axes("other")
    call.sums(call.unify(a[-1], b[-2] if len(b) > 1 else b[0]), call.given["self"], call.given["other"])
    if call.given["self"].op != "get_attr" and call.given["other"].op != "get_attr":
        a[-1].mark("head_dim")
        for axis in a[:-2]:
            axis.mark("heads")
    batch = call.inference.broadcast(call.node, [a[:-2], b[:-2]]) if len(a) > 2 or len(b) > 2 else ()
    return (*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else ()))


@axis_rule(aten.einsum.default)
def einsum(call: Call) -> Axes:
    """Equal letters are one axis; letters that the output lacks are summed."""
    equation = call.given["equation"].replace(" ", "")
    if "." in equation:
        raise AxisError("an ellipsis in einsum is not understood")
    left, _, right = equation.partition("->")
    letters: dict[str, Axis] = {}
    for term, tensor in zip(left.split(","), call.given["tensors"], strict=True):
        for letter, axis in zip(term, call.inference.of(tensor), strict=True):
            letters[letter] = call.unify(letters[letter], axis) if letter in letters else axis
    if "->" not in equation:
        joined = left.replace(",", "")
        right = "".join(sorted(letter for letter in set(joined) if joined.count(letter) == 1))
    for letter, axis in letters.items():
        if letter not in right:
            call.sums(axis, *call.given["tensors"])
    return tuple(letters[letter] for letter in right)


@axis_rule(aten.scaled_dot_product_attention.default)
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
        batch = (*call.inference.broadcast(call.node, [q[:-3], k[:-3], v[:-3]]), heads) if len(q) > 3 else (heads,)
    else:
        batch = call.inference.broadcast(call.node, [q[:-2], k[:-2], v[:-2]])
    for axis in batch:
        axis.mark("heads")
    k[-2].lock("attention takes a softmax over it")
    if call.given["is_causal"]:
        q[-2].lock("its positions are compared")
    if call.has("attn_mask"):
        call.inference.broadcast(call.node, [(*batch, q[-2], k[-2]), call.axes("attn_mask")])
    return (*batch, q[-2], v[-1])


@axis_rule(*CONVOLUTIONS)
def convolution(call: Call) -> Axes:
    """x[n (g·i) …], w[(g·o) i …] → [n (g·o) …]."""
    x, weight, groups = call.axes("input"), call.axes("weight"), call.given["groups"]
    batched = len(x) == len(weight)
    channels = x[1] if batched else x[0]
    if groups == 1:
        call.unify(channels, weight[1])
    else:
        group = call.fresh(groups)
        group.mark("groups")
        call.counts("groups", group)
        call.unify(channels, product([group, weight[1]]))
        outputs = weight[0].find().size
        assert isinstance(outputs, int)
        call.unify(weight[0], product([group, call.fresh(outputs // groups)]))
    return _convolved(call, x, weight, weight[0], batched)


@axis_rule(*TRANSPOSED_CONVOLUTIONS)
def transposed_convolution(call: Call) -> Axes:
    """x[n (g·i) …], w[(g·i) o …] → [n (g·o) …]."""
    x, weight, groups = call.axes("input"), call.axes("weight"), call.given["groups"]
    batched = len(x) == len(weight)
    channels = call.unify(x[1] if batched else x[0], weight[0])
    outputs = weight[1]
    if groups > 1:
        group = call.fresh(groups)
        group.mark("groups")
        call.counts("groups", group)
        size = channels.find().size
        assert isinstance(size, int)
        call.unify(channels, product([group, call.fresh(size // groups)]))
        outputs = product([group, weight[1]])
    return _convolved(call, x, weight, outputs, batched)


def _convolved(call: Call, x: Axes, weight: Axes, outputs: Axis, batched: bool) -> Axes:
    """Space is locked, unless the kernel is 1 wide along it and leaves its size."""
    reason = "it is a spatial dimension of a convolution"
    first = 2 if batched else 1
    spatial = list(x[first:])
    for d, (kernel, size) in enumerate(zip(weight[2:], call.sizes()[first:], strict=True)):
        kernel.lock(reason)
        if kernel.find().size != 1 or spatial[d].find().size != size:
            spatial[d].lock(reason)
            spatial[d] = call.fixed(size, reason)
    if call.has("bias"):
        call.unify(outputs, call.axes("bias")[0])
    outputs.mark("channels")
    return (*(x[:1] if batched else ()), outputs, *spatial)


@axis_rule(aten.embedding.default)
def embedding(call: Call) -> Axes:
    """w[v d], i[…] → [… d]."""
    weight = call.axes("weight")
    weight[0].lock("it is indexed by the rows of an embedding")
    return (*call.axes("indices"), weight[1])


@axis_rule(aten.lstm.input, aten.gru.input)
def recurrent(call: Call) -> list[Axes]:
    """Per layer and direction: w_ih[(g·h) i], w_hh[(g·h) h], biases [(g·h)]; the next reads all directions."""
    lstm = call.node.target is aten.lstm.input
    gates = 4 if lstm else 3
    states = call.given["hx"] if lstm else [call.given["hx"]]
    parameters, biased = call.given["params"], call.given["has_biases"]
    directions = 2 if call.given["bidirectional"] else 1
    count = 4 if biased else 2
    x = call.axes("input")
    first = call.inference.of(states[0])
    if len(parameters) != count * directions * call.given["num_layers"]:
        raise AxisError("projected states are not understood")
    hidden = call.fresh(first[-1].find().size)
    hidden.mark("hidden")
    source = x[-1]
    for layer in range(call.given["num_layers"]):
        for direction in range(directions):
            at = count * (layer * directions + direction)
            w_ih, w_hh, *biases = (call.inference.of(p) for p in parameters[at : at + count])
            call.unify(w_ih[1], source)
            call.unify(w_hh[1], hidden)
            for stacked in (w_ih[0], w_hh[0], *(bias[0] for bias in biases)):
                call.unify(stacked, product([call.fixed(gates, "it counts the gates of a recurrent layer"), hidden]))
        source = concatenation([hidden] * directions) if directions > 1 else hidden
    for state in states:
        axes = call.inference.of(state)
        call.unify(axes[-1], hidden)
        call.inference.lock_all(axes[:-1], "it counts the layers or rows of a recurrent state")
    outputs: list[Axes] = [(*x[:-1], source)]
    return [*outputs, *((*first[:-1], hidden) for _ in states)]


# --- norms and reductions ----------------------------------------------------------------------------------


@axis_rule(aten.batch_norm.default, aten.instance_norm.default)
def channel_norm(call: Call) -> Axes:
    """Dimension 1 carries weight, bias and running statistics; those of the input itself run over the others."""
    x = call.axes("input")
    alone = call.node.target is aten.instance_norm.default
    if call.given["use_input_stats" if alone else "training"] or not call.has("running_mean"):
        for axis in (*(() if alone else x[:1]), *x[2:]):
            axis.mark_inexact(f"{call.node.target} takes statistics over it")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.has(name):
            call.unify(x[1], call.axes(name)[0])
    return x


@axis_rule(aten.layer_norm.default, aten.rms_norm.default)
def layer_norm(call: Call) -> Axes:
    """Statistics over the last dimensions, which carry weight and bias."""
    x = call.axes("input")
    normalized = x[len(x) - len(call.given["normalized_shape"]) :]
    call.counts("normalized_shape", normalized)
    for axis in normalized:
        axis.mark_inexact(f"{call.node.target} takes statistics over it")
    for name in ("weight", "bias"):
        if call.has(name):
            for axis, own in zip(normalized, call.axes(name), strict=True):
                call.unify(axis, own)
    return x


@axis_rule(aten._weight_norm.default)
def weight_norm(call: Call) -> Axes:
    """v[… d …] · g[1 d 1] / norm of v over all other dimensions."""
    v, g, dim = call.axes("v"), call.axes("g"), call.given["dim"] % len(call.axes("v"))
    for d, axis in enumerate(v):
        axis.mark_inexact("weight_norm divides by a norm " + ("over it" if d != dim else "that is zero for zeros"))
    return call.inference.broadcast(call.node, [v, g])


@axis_rule(aten.group_norm.default)
def group_norm(call: Call) -> Axes:
    """Dimension 1 = groups × width, with statistics over the width."""
    x, groups = call.axes("input"), call.given["num_groups"]
    channels = x[1].find().size
    assert isinstance(channels, int)
    width = call.fresh(channels // groups)
    group = call.fresh(groups)
    group.mark("groups")
    call.counts("num_groups", group)
    call.unify(x[1], product([group, width]))
    for axis in (width, *x[2:]):
        axis.mark_inexact("group_norm takes statistics over it")
    for name in ("weight", "bias"):
        if call.has(name):
            call.unify(x[1], call.axes(name)[0])
    return x


@axis_rule(aten.softmax.int, aten.log_softmax.int, aten._softmax.default, aten._log_softmax.default)
def softmax(call: Call) -> Axes:
    """The normalised dimension is locked: each of its positions weighs on the others."""
    x = call.axes("self")
    x[call.given["dim"]].lock("a softmax runs over it")
    return x


@axis_rule(aten.cumsum.default, aten.cumprod.default, aten.diff.default, aten.flip.default, aten.roll.default)
def ordered(call: Call) -> Axes:
    """The order of positions matters along the given dimensions."""
    x = call.axes("self")
    dims = call.given.get("dims", call.given.get("dim"))
    chosen = range(len(x)) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
    for dim in chosen:
        x[dim].lock(f"{call.node.target} depends on the order of its positions")
    result = list(x)
    for dim, (axis, size) in enumerate(zip(x, call.sizes(), strict=True)):
        if axis.find().size != size:
            result[dim] = call.fixed(size, f"{call.node.target} gave it another size")
    return tuple(result)


_SUMS = {aten.sum.dim_IntList, aten.sum.default, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim}


@axis_rule(
    *_overloads([aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default, aten.amax.default]),
    *_overloads([aten.amin.default, aten.var.dim, aten.var.correction, aten.std.dim, aten.std.correction]),
    *_overloads([aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.logsumexp.default]),
    *_overloads([aten.max.dim, aten.min.dim, aten.var_mean.correction, aten.prod.dim_int, aten.any.dim, aten.all.dim]),
    *_overloads([aten.argmax.default, aten.argmin.default, aten.max.default, aten.min.default]),
)
def reduction(call: Call) -> Any:
    """Reduced dimensions vanish. A sum of zeros is zero; any other reduction is a statistic over the axis."""
    x = call.axes("self")
    dims = call.given.get("dim")
    chosen = (
        set(range(len(x))) if dims in (None, []) else {d % len(x) for d in ([dims] if isinstance(dims, int) else dims)}
    )
    for dim in chosen:
        if call.node.target in (aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim):
            x[dim].lock(f"{call.node.target} gives positions along it")
        elif call.node.target in _SUMS:
            call.sums(x[dim], call.given["self"])
        else:
            x[dim].mark_inexact(f"{call.node.target} runs over it")
    keep = call.given.get("keepdim", False)
    axes = tuple(axis if d not in chosen else call.fresh(1) for d, axis in enumerate(x) if d not in chosen or keep)
    value = call.node.meta["val"]
    return axes if isinstance(value, torch.Tensor) else [axes for _ in value]


@axis_rule(
    *_overloads([aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default]),
    *_overloads([aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default]),
    *_overloads([aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default]),
    *_overloads([aten.adaptive_avg_pool3d.default, aten.adaptive_max_pool2d.default]),
    *_overloads([aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec]),
    *_overloads([aten.upsample_nearest1d.vec, aten.upsample_linear1d.vec, aten.upsample_trilinear3d.vec]),
    *_overloads([aten.upsample_nearest3d.vec, aten.upsample_nearest2d.default, aten.upsample_bilinear2d.default]),
    *_overloads([aten.upsample_bicubic2d.default, aten._upsample_bilinear2d_aa.default]),
    *_overloads([aten.max_pool2d_with_indices.default, aten.grid_sampler.default, aten.reflection_pad2d.default]),
    *_overloads(
        [aten._upsample_bicubic2d_aa.default, aten._upsample_bicubic2d_aa.vec, aten._upsample_bilinear2d_aa.vec]
    ),
)
def spatial(call: Call) -> Any:
    """Rows and channels stay; what follows is computed along space, unless the window is 1 wide there."""
    source = call.given.get("self", call.given.get("input"))
    assert isinstance(source, fx.Node)
    x = call.inference.of(source)
    value = call.node.meta["val"]
    sizes = sizes_of(value if isinstance(value, torch.Tensor) else value[0])
    rank = 1 if "1d" in str(call.node.target) else 3 if "3d" in str(call.node.target) else 2
    output = list(x)
    window = call.given.get("kernel_size") or ()
    for d in range(len(x) - rank, len(x)):
        along = window[(d - len(x)) % len(window)] if window else None
        if along != 1 or x[d].find().size != sizes[d]:
            x[d].lock(f"{call.node.target} runs over it")
            output[d] = call.fixed(sizes[d], f"{call.node.target} runs over it")
    return tuple(output) if isinstance(value, torch.Tensor) else [tuple(output) for _ in value]


# --- views -------------------------------------------------------------------------------------------------


@axis_rule(
    *_overloads([aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int]),
    *_overloads([aten._unsafe_view.default, aten.view_as.default, aten.reshape_as.default, aten.squeeze.default]),
    *_overloads([aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default]),
)
def view(call: Call) -> Axes:
    """Runs of dimensions with equal product of sizes are the same product of axes."""
    source: fx.Node = call.given["self"]
    inputs = [axis for axis in call.axes("self") if axis.find().size != 1]
    sizes = call.sizes()
    hints = [_hint(size) for size in call.node.meta["val"].shape]
    hint_of = dict(zip(map(id, call.axes("self")), map(_hint, source.meta["val"].shape), strict=True))
    outputs: list[Axis] = [call.fresh(size) for size in sizes]
    left, right = list(inputs), [i for i, size in enumerate(sizes) if size != 1]
    while left or right:
        run_in, run_out = [left.pop(0)] if left else [], [right.pop(0)] if right else []
        if not run_in or not run_out:
            raise AxisError(f"a view of {[str(a) for a in inputs]} as {sizes} is not understood")
        while True:
            size_in, size_out = total(a.find().size for a in run_in), total(sizes[i] for i in run_out)
            if _equal(size_in, size_out):
                break
            hint_in = total(hint_of[id(a)] for a in run_in)
            hint_out = total(hints[i] for i in run_out)
            if (hint_in <= hint_out and left) or not right:
                if not left:
                    raise AxisError(f"a view of {[str(a) for a in inputs]} as {sizes} is not understood")
                run_in.append(left.pop(0))
            else:
                run_out.append(right.pop(0))
        if len(run_in) == len(run_out) == 1:
            outputs[run_out[0]] = run_in[0]
        else:
            call.unify(product(run_in), product([outputs[i] for i in run_out]))
    if call.node.target is aten.unflatten.int:
        dim = call.given["dim"] % len(call.axes("self"))
        call.counts("sizes", outputs[dim : dim + len(call.given["sizes"])])
    elif "size" in call.given or "shape" in call.given:
        call.counts("size" if "size" in call.given else "shape", outputs)
    if call.node.target in (aten.view_as.default, aten.reshape_as.default):
        return tuple(call.unify(axis, own) for axis, own in zip(outputs, call.axes("other"), strict=True))
    return tuple(outputs)


def _hint(size: int | torch.SymInt) -> int:
    """The size in the traced example; reading it otherwise would make it a constant."""
    return size if isinstance(size, int) else int(size.node.hint)


def _equal(a: Size, b: Size) -> bool:
    return bool(a == b) or (not isinstance(a - b, int) and (a - b).expand() == 0)


@axis_rule(aten.permute.default)
def permute(call: Call) -> Axes:
    """Dimensions change places."""
    x = call.axes("self")
    return tuple(x[dim] for dim in call.given["dims"])


@axis_rule(aten.transpose.int, *_overloads([aten.swapaxes.default]))
def transpose(call: Call) -> Axes:
    """Two dimensions change places."""
    x = list(call.axes("self"))
    a, b = list(call.given.values())[1:3]
    x[a], x[b] = x[b], x[a]
    return tuple(x)


@axis_rule(aten.t.default, aten.numpy_T.default, aten.mT.default)
def reverse(call: Call) -> Axes:
    """The (last) two dimensions change places."""
    x = call.axes("self")
    return x[::-1] if call.node.target is not aten.mT.default else (*x[:-2], x[-1], x[-2])


@axis_rule(aten.movedim.int, aten.movedim.intlist)
def movedim(call: Call) -> Axes:
    """Dimensions move; the others keep their order."""
    x = call.axes("self")
    source, target = call.given["source"], call.given["destination"]
    source, target = ([source], [target]) if isinstance(source, int) else (source, target)
    moved = {t % len(x): s % len(x) for s, t in zip(source, target, strict=True)}
    rest = iter(number for number in range(len(x)) if number not in moved.values())
    return tuple(x[moved[d]] if d in moved else x[next(rest)] for d in range(len(x)))


@axis_rule(aten.expand.default, aten.broadcast_to.default)
def expand(call: Call) -> Axes:
    """A dimension of size 1, or a new one, is repeated: a new axis, free until it meets another."""
    x, sizes = call.axes("self"), call.sizes()
    padded = (*(None for _ in range(len(sizes) - len(x))), *x)
    outputs = tuple(
        axis if axis is not None and axis.find().size == size else call.fresh(size)
        for axis, size in zip(padded, sizes, strict=True)
    )
    call.counts("size", outputs)
    return outputs


@axis_rule(aten.repeat.default)
def repeat(call: Call) -> Axes:
    """[r0 r1 …] times: each dimension is repeats × axis."""
    x, repeats = call.axes("self"), call.given["repeats"]
    padded = (*(Axis(1) for _ in range(len(repeats) - len(x))), *x)
    output = []
    for axis, size in zip(padded, call.sizes(), strict=True):
        if axis.find().size == size:
            output.append(axis)
        elif axis.find().size == 1:
            output.append(call.fixed(size, "it counts repetitions"))
        else:
            times = total([size]) / axis.find().size if not isinstance(size, int) else size // axis.find().size
            output.append(product([call.fixed(times, "it counts repetitions"), axis]))
    return tuple(output)


@axis_rule(aten.repeat_interleave.self_int)
def repeat_interleave(call: Call) -> Axes:
    """Each position `n` times: axis × repeats."""
    x, dim = list(call.axes("self")), call.given["dim"]
    if dim is None:
        raise AxisError("repeat_interleave without a dimension is not understood")
    x[dim] = product([x[dim], call.fixed(call.given["repeats"], "it counts repetitions")])
    return tuple(x)


# --- cutting and joining -----------------------------------------------------------------------------------


@axis_rule(aten.cat.default, *_overloads([aten.concat.default]))
def cat(call: Call) -> Axes:
    """The given dimension is a concatenation; the others are the same in all tensors."""
    tensors = [call.inference.of(node) for node in call.given["tensors"]]
    tensors = [axes for axes in tensors if len(axes) == len(call.sizes())]
    dim = call.given["dim"] % len(tensors[0])
    output = list(tensors[0])
    for axes in tensors[1:]:
        for d, axis in enumerate(axes):
            if d != dim:
                output[d] = call.unify(output[d], axis)
    if not all(isinstance(axes[dim].find().size, int) for axes in tensors):
        call.inference.lock_all([axes[dim] for axes in tensors], "it is joined along a free size")
        output[dim] = call.fixed(call.sizes()[dim], "it is joined along a free size")
    else:
        output[dim] = concatenation([axes[dim] for axes in tensors])
    return tuple(output)


@axis_rule(aten.stack.default)
def stack(call: Call) -> Axes:
    """A new dimension counts the tensors."""
    tensors = [call.inference.of(node) for node in call.given["tensors"]]
    output = list(call.inference.broadcast(call.node, tensors))
    dim = call.given["dim"] % (len(output) + 1)
    output.insert(dim, call.fixed(len(tensors), "it counts stacked tensors"))
    return tuple(output)


def _pieces(call: Call, dim: int) -> list[Axes]:
    """The output's pieces along `dim`, by the sizes that they have."""
    x = call.axes("self")
    values = call.node.meta["val"]
    sizes = [value.shape[dim] for value in values]
    rest, pieces = x[dim], []
    try:
        for size in sizes[:-1]:
            head, rest = cut(rest, size)
            pieces.append(head)
        pieces.append(rest)
    except AxisError as error:
        x[dim].lock(str(error))
        pieces = [call.fixed(s if isinstance(s, int) else s.node.expr, str(error)) for s in sizes]
    else:
        call.counts("split_sizes", pieces)
    return [(*x[:dim], piece, *x[dim + 1 :]) for piece in pieces]


@axis_rule(
    *_overloads([aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default]),
    *_overloads([aten.tensor_split.sections]),
)
def split(call: Call) -> list[Axes]:
    """The given dimension is the concatenation of the pieces."""
    return _pieces(call, call.given["dim"] % len(call.axes("self")))


@axis_rule(aten.unbind.int)
def unbind(call: Call) -> list[Axes]:
    """The given dimension vanishes; its positions have meanings of their own."""
    x = call.axes("self")
    dim = call.given["dim"] % len(x)
    x[dim].lock("it is taken apart position by position")
    return [(*x[:dim], *x[dim + 1 :]) for _ in call.node.meta["val"]]


@axis_rule(aten.select.int)
def select(call: Call) -> Axes:
    """One position of the given dimension; of a constant it is like any other."""
    x = call.axes("self")
    dim = call.given["dim"] % len(x)
    if call.given["self"].target not in _CONSTANTS or call.given["index"] not in (0, -1):
        x[dim].lock("one of its positions is selected")
    return (*x[:dim], *x[dim + 1 :])


@axis_rule(aten.slice.Tensor)
def slice_(call: Call) -> Axes:
    """A run of positions of the given dimension."""
    x, sizes = list(call.axes("self")), call.sizes()
    dim = call.given["dim"] % len(x)
    size, axis = sizes[dim], x[dim]
    if axis.find().size == size and call.given["step"] == 1:
        return tuple(x)
    whole, start = axis.find().size, call.given["start"] or 0
    if call.given["step"] != 1 or not all(isinstance(number, int) for number in (whole, start, size)):
        axis.lock("a part of it is taken by position")
        x[dim] = call.fixed(size, "a part of another dimension, taken by position")
        return tuple(x)
    start = max(start + whole if start < 0 else start, 0)
    head, piece = Axis(0), axis
    try:
        if start:
            head, piece = cut(piece, start)
        if piece.find().size != size:
            piece = cut(piece, size)[0]
        call.counts("start", head)
        call.counts("end", concatenation([head, piece]))
    except AxisError as error:
        axis.lock(str(error))
        piece = call.fixed(size, str(error))
    x[dim] = piece
    return tuple(x)


@axis_rule(aten.slice_scatter.default)
def slice_scatter(call: Call) -> Axes:
    """A run of positions of one dimension is replaced; the others are the same in both tensors."""
    x, source = call.axes("self"), call.axes("src")
    dim = call.given["dim"] % len(x)
    whole = x[dim].find().size == source[dim].find().size
    if not whole:
        call.inference.lock_all([x[dim], source[dim]], "a part of it is replaced by position")
    return tuple(axis if d == dim and not whole else call.unify(axis, source[d]) for d, axis in enumerate(x))


@axis_rule(aten.select_scatter.default)
def select_scatter(call: Call) -> Axes:
    """One position of one dimension is replaced; the others are the same in both tensors."""
    x, source = list(call.axes("self")), iter(call.axes("src"))
    dim = call.given["dim"] % len(x)
    x[dim].lock("one of its positions is replaced")
    return tuple(axis if d == dim else call.unify(axis, next(source)) for d, axis in enumerate(x))


@axis_rule(aten.topk.default, aten.sort.default, aten.sort.stable, aten.kthvalue.default)
def ranked(call: Call) -> list[Axes]:
    """Values and positions along one dimension, whose order is lost."""
    x = list(call.axes("self"))
    dim = call.given["dim"] % len(x)
    x[dim].lock(f"{call.node.target} compares its positions")
    if call.given.get("keepdim", True):
        x[dim] = call.fixed(sizes_of(call.node.meta["val"][0])[dim], f"{call.node.target} gives ranks")
    else:
        del x[dim]
    return [tuple(x), tuple(x)]


@axis_rule(aten.meshgrid.default, aten.meshgrid.indexing)
def meshgrid(call: Call) -> list[Axes]:
    """Every tensor has one dimension for each vector; `xy` swaps the first two."""
    axes = [axis for vector in call.given["tensors"] for axis in call.inference.of(vector) or (Axis(1),)]
    if call.given.get("indexing") == "xy":
        axes[:2] = axes[1::-1]
    return [tuple(axes) for _ in call.node.meta["val"]]


@axis_rule(aten.glu.default)
def glu(call: Call) -> Axes:
    """The first half times the sigmoid of the second."""
    x = list(call.axes("self"))
    dim = call.given["dim"] % len(x)
    size = x[dim].find().size
    assert isinstance(size, int)
    head, tail = cut(x[dim], size // 2)
    x[dim] = call.unify(head, tail)
    return tuple(x)


@axis_rule(aten.constant_pad_nd.default, aten.pad.default)
def pad(call: Call) -> Axes:
    """Padded dimensions are locked."""
    x, sizes = list(call.axes("self")), call.sizes()
    pads = call.given["pad"]
    for index in range(len(pads) // 2):
        if pads[2 * index : 2 * index + 2] != [0, 0]:
            dim = len(x) - 1 - index
            x[dim].lock("it is padded")
            x[dim] = call.fixed(sizes[dim], "it is padded")
    return tuple(x)


@axis_rule(aten.index.Tensor)
def index(call: Call) -> Axes:
    """Indexed dimensions are locked; the others stay, after the index's own where those are not adjacent."""
    x, indices = call.axes("self"), call.given["indices"]
    indices = [*indices, *[None] * (len(x) - len(indices))]
    if any(i is not None and i.meta["val"].dtype in (torch.bool, torch.uint8) for i in indices):
        raise AxisError("indexing by a mask is not understood")
    used = [d for d, i in enumerate(indices) if i is not None]
    for d in used:
        x[d].lock("its positions are indexed")
    shape = call.inference.broadcast(call.node, [call.inference.of(indices[d]) for d in used])
    kept = [(d, axis) for d, axis in enumerate(x) if d not in used]
    adjacent = used == list(range(used[0], used[0] + len(used)))
    at = used[0] if adjacent else 0
    before = [axis for d, axis in kept if d < at] if adjacent else []
    after = [axis for d, axis in kept if not (adjacent and d < at)]
    return (*before, *shape, *after)


@axis_rule(aten.index_select.default)
def index_select(call: Call) -> Axes:
    """One dimension is indexed."""
    x = list(call.axes("self"))
    dim = call.given["dim"] % len(x)
    x[dim].lock("its positions are indexed")
    x[dim] = call.axes("index")[0]
    return tuple(x)


@axis_rule(aten.gather.default)
def gather(call: Call) -> Axes:
    """One dimension is indexed; the others are the index's own, where they are as long."""
    x, at, dim = call.axes("self"), call.axes("index"), call.given["dim"] % len(call.axes("self"))
    x[dim].lock("its positions are indexed")
    for d, (axis, own) in enumerate(zip(x, at, strict=True)):
        if d != dim and axis.find().size == own.find().size:
            call.unify(axis, own)
        elif d != dim:
            call.inference.lock_all([axis, own], "a part of it is gathered")
    return at


@axis_rule(aten.pixel_shuffle.default)
def pixel_shuffle(call: Call) -> Axes:
    """[… (c·r·r) h w] → [… c (h·r) (w·r)]."""
    *rest, channels, _, _ = call.axes("self")
    factor = call.given["upscale_factor"]
    sizes = call.sizes()
    output = call.fresh(sizes[-3])
    fixed = [call.fixed(factor, "it is a factor of pixel_shuffle") for _ in range(2)]
    call.unify(channels, product([output, *fixed]))
    return (*rest, output, *(call.fixed(size, "it is a spatial dimension") for size in sizes[-2:]))


@axis_rule(aten.pixel_unshuffle.default)
def pixel_unshuffle(call: Call) -> Axes:
    """[… c (h·r) (w·r)] → [… (c·r·r) h w]."""
    *rest, channels, _, _ = call.axes("self")
    factor = call.given["downscale_factor"]
    fixed = [call.fixed(factor, "it is a factor of pixel_unshuffle") for _ in range(2)]
    tail = (call.fixed(size, "it is a spatial dimension") for size in call.sizes()[-2:])
    return (*rest, product([channels, *fixed]), *tail)


@axis_rule(aten.channel_shuffle.default, aten.native_channel_shuffle.default)
def channel_shuffle(call: Call) -> Axes:
    """[n (g·c) …] → [n (c·g) …]."""
    x, groups = list(call.axes("self")), call.given["groups"]
    size = x[1].find().size
    assert isinstance(size, int)
    group, width = call.fresh(groups), call.fresh(size // groups)
    call.unify(x[1], product([group, width]))
    x[1] = product([width, group])
    return tuple(x)


@axis_rule(aten.unfold.default)
def unfold(call: Call) -> Axes:
    """Windows along one dimension: it counts them, and a new last dimension runs through each."""
    x = list(call.axes("self"))
    dim = call.given["dimension"] % len(x)
    x[dim].lock("windows run over it")
    x[dim] = call.fixed(call.sizes()[dim], "it counts windows")
    return (*x, call.fixed(call.sizes()[-1], "it runs through a window"))


@axis_rule(aten.im2col.default)
def im2col(call: Call) -> Axes:
    """[n c h w] → [n (c·k·k) l]."""
    n, channels, *_ = call.axes("self")
    kernel = [call.fixed(size, "it is a kernel dimension") for size in call.given["kernel_size"]]
    return (n, product([channels, *kernel]), call.fixed(call.sizes()[-1], "it is a spatial dimension"))


@axis_rule(aten.prelu.default)
def prelu(call: Call) -> Axes:
    """A slope per channel (dimension 1), or one for all."""
    x, weight = call.axes("self"), call.axes("weight")
    if weight[0].find().size != 1:
        call.unify(x[1], weight[0])
    return x


@axis_rule(aten.tril.default, aten.triu.default)
def triangle(call: Call) -> Axes:
    """The last two dimensions are compared by position."""
    x = call.axes("self")
    call.inference.lock_all(x[-2:], "its positions are compared")
    return x


# --- creation ----------------------------------------------------------------------------------------------


@axis_rule(
    *_overloads([aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format]),
    *_overloads([aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default]),
    *_overloads([aten.scalar_tensor.default]),
)
def constant(call: Call) -> Axes:
    """The same value everywhere: positions can go."""
    outputs = tuple(call.fresh(size) for size in call.sizes())
    if "size" in call.given:
        call.counts("size", outputs)
    return outputs


@axis_rule(
    *_overloads([aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default, aten.eye.m]),
    *_overloads([aten.linspace.default]),
)
def positions(call: Call) -> Axes:
    """Values that count positions."""
    return tuple(call.fixed(size, "its values count positions") for size in call.sizes())
