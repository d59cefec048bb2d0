"""Number formats: every code against ml_dtypes or the formula, rounding against brute force, packing against numpy."""

from __future__ import annotations

from typing import Any

import hypothesis
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from lobo_fx.own_operators.decode import decode
from lobo_fx.own_operators.formats import FORMATS, pack, unpack

Array = npt.NDArray[Any]
MINIFLOATS: dict[str, type] = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m4": ml_dtypes.float8_e3m4,
}
LOGARITHMIC = {"log2_4": 1, "log2_6": 4, "log2_8": 16}
SIGNED = [*MINIFLOATS, *LOGARITHMIC]
CODES = np.arange(256, dtype=np.uint8)


def encode(name: str, values: Array) -> Array:
    return FORMATS[name].encode(torch.from_numpy(np.asarray(values, np.float32))).numpy()


def values_of(name: str) -> Array:
    """The value of every code, NaN where there is none."""
    return FORMATS[name].table.numpy()


@pytest.mark.parametrize("name", MINIFLOATS)
def test_every_code_of_a_minifloat_is_that_of_ml_dtypes(name: str) -> None:
    expected = CODES.view(MINIFLOATS[name]).astype(np.float32)
    found = values_of(name)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isnan(found), ~finite)
    np.testing.assert_array_equal(found[finite], expected[finite])
    np.testing.assert_array_equal(np.signbit(found[finite]), np.signbit(expected[finite]))
    assert FORMATS[name].largest == expected[finite].max()


@pytest.mark.parametrize("name", MINIFLOATS)
def test_a_minifloat_rounds_as_ml_dtypes_does(name: str) -> None:
    """Every middle of two neighbours (a tie) and the float32 numbers next to it, subnormals and zeros included."""
    known = np.unique(values_of(name)[np.isfinite(values_of(name))])
    middles = (known[1:] + known[:-1]) / 2
    near = [np.nextafter(middles, np.float32(bound)) for bound in (-np.inf, np.inf)]
    random = np.random.default_rng(0).normal(0, FORMATS[name].largest / 4, 20_000).astype(np.float32)
    small = random * np.float32(2.0**-9)
    values = np.concatenate([known, middles, *near, random, small, [np.float32(-0.0)]])
    values = values[np.abs(values) <= FORMATS[name].largest]
    np.testing.assert_array_equal(encode(name, values), values.astype(MINIFLOATS[name]).view(np.uint8))


@pytest.mark.parametrize("name", LOGARITHMIC)
def test_every_code_of_a_logarithmic_format_is_a_power_of_two(name: str) -> None:
    bits, per_octave = FORMATS[name].bits, LOGARITHMIC[name]
    codes = np.arange(1, 2 ** (bits - 1))
    powers = 2.0 ** ((codes - codes[-1]) / per_octave)
    expected = np.concatenate([[0], powers, [0], -powers]).astype(np.float32)
    np.testing.assert_allclose(values_of(name), expected, rtol=1e-7)
    whole = (codes - codes[-1]) % per_octave == 0
    np.testing.assert_array_equal(values_of(name)[codes[whole]], powers[whole])
    assert FORMATS[name].largest == 1


@pytest.mark.parametrize("name", SIGNED)
def test_a_value_goes_to_the_nearest_code_and_a_tie_to_the_even_one(name: str) -> None:
    table = values_of(name)[: 2 ** (FORMATS[name].bits - 1)].astype(np.float64)
    table = table[np.isfinite(table)]
    values = np.concatenate([np.random.default_rng(1).uniform(0, table[-1], 2000), (table[1:] + table[:-1]) / 2])
    values = values.astype(np.float32)
    distances = np.abs(values[:, None].astype(np.float64) - table)
    nearest = distances == distances.min(1, keepdims=True)
    expected = [next((code for code in np.flatnonzero(row) if code % 2 == 0), row.argmax()) for row in nearest]
    found = encode(name, values)
    exact = name in MINIFLOATS  # a middle of two logarithmic values is no float32
    agree = found == expected if exact else distances[np.arange(len(values)), found] <= distances.min(1) + 1e-7
    assert agree.all()
    np.testing.assert_array_equal(encode(name, -values), found + 2 ** (FORMATS[name].bits - 1))


@pytest.mark.parametrize("name", SIGNED)
def test_encoding_a_value_gives_its_code_back_and_too_large_ones_the_largest(name: str) -> None:
    table = values_of(name)
    codes = np.flatnonzero(np.isfinite(table))
    np.testing.assert_array_equal(encode(name, table[codes]), codes)
    largest = int(np.nanargmax(table))
    edges = np.array([table[largest] * 1.5, 1e30, np.inf, -1e30])
    sign = 2 ** (FORMATS[name].bits - 1)
    np.testing.assert_array_equal(encode(name, edges), [largest] * 3 + [largest + sign])


def test_integers_round_to_even_and_saturate() -> None:
    values = np.array([0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e9, -1e9])
    np.testing.assert_array_equal(encode("int8", values), [0, 0, 2, 2, 0, -2, 126, 127, 127, -127])
    np.testing.assert_array_equal(encode("int4", values[:8]), [8, 8, 10, 10, 8, 6, 15, 15])
    assert int(encode("int4", np.array([-1e9]))[0]) == 0
    codes = torch.arange(16, dtype=torch.uint8)
    np.testing.assert_array_equal(FORMATS["int4"].decode(codes), np.arange(16) - 8)


@hypothesis.given(
    st.sampled_from([4, 6, 8]).flatmap(
        lambda bits: st.tuples(
            st.just(bits),
            hypothesis_numpy.arrays(
                np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 19)), elements=st.integers(0, 2**bits - 1)
            ),
        )
    )
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_packing_is_a_stream_of_bits_and_loses_nothing(drawn: tuple[int, Array]) -> None:
    bits, codes = drawn
    packed = pack(torch.from_numpy(codes), bits)
    stream = np.unpackbits(codes[..., None], axis=2, bitorder="little")[..., :bits].reshape(len(codes), -1)
    expected = np.packbits(stream, axis=1, bitorder="little")
    found = packed.numpy()
    np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)
    assert not found[:, expected.shape[1] :].any()
    assert found.shape[1] - expected.shape[1] < 3
    np.testing.assert_array_equal(unpack(packed, bits, codes.shape[1]).numpy(), codes)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("block_size", [4, 10])
def test_a_weight_is_its_values_times_the_scales_of_their_blocks(name: str, block_size: int) -> None:
    """Three rows of ten columns: the last block is short, or a row is one block."""
    number, generator = FORMATS[name], np.random.default_rng(2)
    blocks = -(-10 // block_size)
    scale = generator.uniform(0.1, 2, (3, blocks)).astype(np.float32)
    zeros = generator.integers(0, 16, (3, blocks)).astype(np.uint8)
    high = 2**number.bits - 1 if number.bits < 8 else 100
    codes = generator.integers(0, high + 1, (3, 10)).astype(np.int8 if name == "int8" else np.uint8)
    block = np.arange(10) // block_size
    if number.is_integer:
        values = codes - zeros[:, block].astype(np.float32) if name == "int4" else codes.astype(np.float32)
    else:
        values = values_of(name)[codes]
    stored = torch.from_numpy(codes)
    found = decode(
        pack(stored, number.bits) if number.bits < 8 else stored,
        torch.from_numpy(scale),
        pack(torch.from_numpy(zeros), 4) if name == "int4" else None,
        name,
        [3, 5, 2],
        block_size,
    )
    np.testing.assert_array_equal(found.numpy(), (values * scale[:, block]).reshape(3, 5, 2))
