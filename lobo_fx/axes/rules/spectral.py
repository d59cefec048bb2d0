"""Fourier transforms, and views of complex numbers as pairs."""

from __future__ import annotations

from collections.abc import Sequence

from lobo_fx.axes.call import Axes, Call, axis_rule
from lobo_fx.axes.zeros import MOVED
from lobo_fx.graph.operators import aten

__all__ = ["as_complex", "as_real", "part", "transform"]

_ONE = (
    aten.fft_fft.default,
    aten.fft_ifft.default,
    aten.fft_rfft.default,
    aten.fft_irfft.default,
    aten.fft_hfft.default,
)
_TWO = (aten.fft_fft2.default, aten.fft_ifft2.default, aten.fft_rfft2.default, aten.fft_irfft2.default)
_MANY = (aten.fft_fftn.default, aten.fft_ifftn.default, aten.fft_rfftn.default, aten.fft_irfftn.default)
_SHIFTS = (aten.fft_fftshift.default, aten.fft_ifftshift.default)


@axis_rule(*_ONE, *_TWO, *_MANY, *_SHIFTS, zeros=MOVED)
def transform(call: Call) -> Axes:
    """Every position of the transformed dimensions becomes a sum over all of them; the others stay."""
    x, sizes = list(call.axes("self")), call.sizes()
    dims = call.given["dim"]
    chosen: Sequence[int] = range(len(x)) if dims is None else [dims] if isinstance(dims, int) else dims
    for dim in {dim % len(x) for dim in chosen}:
        x[dim].lock(f"{call.node.target} transforms it")
        x[dim] = call.fixed(sizes[dim], f"{call.node.target} transforms it")
    return tuple(x)


@axis_rule(aten.view_as_real.default, zeros=MOVED)
def as_real(call: Call) -> Axes:
    """A new last dimension holds real and imaginary parts."""
    return (*call.axes("self"), call.fixed(2, "it holds real and imaginary parts"))


@axis_rule(aten.view_as_complex.default, zeros=MOVED)
def as_complex(call: Call) -> Axes:
    """The last dimension holds real and imaginary parts, and vanishes."""
    *rest, parts = call.axes("self")
    parts.lock("it holds real and imaginary parts")
    return tuple(rest)


@axis_rule(aten.real.default, aten.imag.default, zeros=MOVED)
def part(call: Call) -> Axes:
    """The real or the imaginary part."""
    return call.axes("self")
