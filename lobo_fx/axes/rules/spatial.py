"""Pooling, interpolation, padding and windows; channels rearranged to space, and space to channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lobo_fx.axes.axis import Axis, concatenation, product
from lobo_fx.axes.call import Axes, Call, axis_rule, lock_all, sizes_of
from lobo_fx.axes.zeros import MOVED, all_of
from lobo_fx.graph.operators import aten

__all__ = [
    "channel_shuffle",
    "col2im",
    "grid_sampler",
    "im2col",
    "pad",
    "pixel_shuffle",
    "pixel_unshuffle",
    "spatial",
    "unfold",
]


@axis_rule(
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default),
    *(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default),
    *(aten.adaptive_avg_pool3d.default, aten.adaptive_max_pool1d.default),
    *(aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default),
    *(aten._upsample_nearest_exact1d.vec, aten._upsample_nearest_exact2d.vec, aten._upsample_nearest_exact3d.vec),
    *(aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec),
    *(aten.upsample_nearest1d.vec, aten.upsample_linear1d.vec, aten.upsample_trilinear3d.vec),
    *(aten.upsample_nearest3d.vec, aten.upsample_nearest2d.default, aten.upsample_bilinear2d.default),
    *(aten.upsample_bicubic2d.default, aten._upsample_bilinear2d_aa.default),
    *(aten.max_pool2d_with_indices.default, aten.reflection_pad2d.default),
    *(aten._upsample_bicubic2d_aa.default, aten._upsample_bicubic2d_aa.vec, aten._upsample_bilinear2d_aa.vec),
    zeros=MOVED,
)
def spatial(call: Call) -> Any:
    """Batch and channels stay; spatial dimensions are locked, unless the window is 1 wide and keeps the size."""
    source = call.given.get("self", call.given.get("input"))
    assert isinstance(source, fx.Node)
    x = call.of(source)
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


@axis_rule(
    *(aten.grid_sampler.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default),
    zeros="input",
)
def grid_sampler(call: Call) -> Axes:
    """x[n c …], grid[n … d] → [n c …]: samples at the places that the grid holds; only n is shared."""
    x, grid = call.axes("input"), call.axes("grid")
    rows = call.unify(x[0], grid[0])
    lock_all([*x[2:], *grid[1:]], "places are sampled from it")
    return (rows, x[1], *(call.fixed(size, "it counts places sampled") for size in call.sizes()[2:]))


@axis_rule(aten.constant_pad_nd.default, aten.pad.default, zeros=all_of("self", "value"))
def pad(call: Call) -> Axes:
    """A free dimension becomes a concatenation with the padding before and after it; other padded ones are locked."""
    x, sizes = list(call.axes("self")), call.sizes()
    pads = call.given["pad"]
    counted = [Axis(0) if isinstance(count, int) else call.fixed(1, "it is computed") for count in pads]
    joined = False
    for index in range(len(pads) // 2):
        before, after = pads[2 * index : 2 * index + 2]
        dim = len(x) - 1 - index
        if (before, after) == (0, 0):
            continue
        constant = call.given.get("mode", "constant") == "constant" and isinstance(x[dim].find().size, int)
        if (
            constant
            and not x[dim].locked
            and isinstance(before, int)
            and isinstance(after, int)
            and min(before, after) >= 0
        ):
            counted[2 * index], counted[2 * index + 1] = call.fresh(before), call.fresh(after)
            x[dim] = concatenation([counted[2 * index], x[dim], counted[2 * index + 1]])
            joined = True
        else:
            x[dim].lock("it is padded")
            x[dim] = call.fixed(sizes[dim], "it is padded")
    if joined:
        call.counts("pad", counted)
    return tuple(x)


@axis_rule(aten.pixel_shuffle.default, zeros=MOVED)
def pixel_shuffle(call: Call) -> Axes:
    """[… (c·r·r) h w] → [… c (h·r) (w·r)]."""
    *rest, channels, _, _ = call.axes("self")
    factor = call.given["upscale_factor"]
    sizes = call.sizes()
    output = call.fresh(sizes[-3])
    fixed = [call.fixed(factor, "it is a factor of pixel_shuffle") for _ in range(2)]
    call.unify(channels, product([output, *fixed]))
    return (*rest, output, *(call.fixed(size, "it is a spatial dimension") for size in sizes[-2:]))


@axis_rule(aten.pixel_unshuffle.default, zeros=MOVED)
def pixel_unshuffle(call: Call) -> Axes:
    """[… c (h·r) (w·r)] → [… (c·r·r) h w]."""
    *rest, channels, _, _ = call.axes("self")
    factor = call.given["downscale_factor"]
    fixed = [call.fixed(factor, "it is a factor of pixel_unshuffle") for _ in range(2)]
    tail = (call.fixed(size, "it is a spatial dimension") for size in call.sizes()[-2:])
    return (*rest, product([channels, *fixed]), *tail)


@axis_rule(aten.channel_shuffle.default, aten.native_channel_shuffle.default, zeros=MOVED)
def channel_shuffle(call: Call) -> Axes:
    """[n (g·c) …] → [n (c·g) …]."""
    x, groups = list(call.axes("self")), call.given["groups"]
    size = x[1].find().size
    assert isinstance(size, int)
    group, width = call.fresh(groups), call.fresh(size // groups)
    call.unify(x[1], product([group, width]))
    call.counts("groups", group)
    x[1] = product([width, group])
    return tuple(x)


@axis_rule(aten.unfold.default, zeros=MOVED)
def unfold(call: Call) -> Axes:
    """Windows along one dimension: that dimension counts the windows, and a new last dimension runs through each."""
    x = list(call.axes("self"))
    dim = call.given["dimension"] % len(x)
    x[dim].lock("windows run over it")
    x[dim] = call.fixed(call.sizes()[dim], "it counts windows")
    return (*x, call.fixed(call.sizes()[-1], "it runs through a window"))


@axis_rule(aten.im2col.default, zeros=MOVED)
def im2col(call: Call) -> Axes:
    """[… c h w] → [… (c·k·k) l]."""
    *rest, channels, height, width = call.axes("self")
    lock_all([height, width], "windows run over it")
    window = [call.fixed(size, "it is a dimension of a window") for size in call.given["kernel_size"]]
    return (*rest, product([channels, *window]), call.fixed(call.sizes()[-1], "it is a spatial dimension"))


@axis_rule(aten.col2im.default, zeros=MOVED)
def col2im(call: Call) -> Axes:
    """[… (c·k·k) l] → [… c h w]; overlapping windows are summed."""
    *rest, channels, windows = call.axes("self")
    *_, size, height, width = call.sizes()
    output = call.fresh(size)
    window = [call.fixed(length, "it is a dimension of a window") for length in call.given["kernel_size"]]
    call.unify(channels, product([output, *window]))
    windows.lock("windows run over it")
    return (*rest, output, *(call.fixed(length, "it is a spatial dimension") for length in (height, width)))
