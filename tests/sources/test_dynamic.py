"""Sizes that stay free, as the command line says it."""

from __future__ import annotations

import pytest
from torch.export import Dim

from lobo_fx.errors import InvalidInput
from lobo_fx.sources.dynamic import for_all_inputs, read_dynamic


def test_words_are_what_they_are() -> None:
    assert [read_dynamic(word) for word in ("auto", "batch", "all", "none")] == ["auto", "batch", "all", None]


def test_names_and_bounds() -> None:
    found = read_dynamic("images:0=batch, images:2=height[32..512],mask:0=batch,mask:1=width[8..],ids:1=auto")
    assert {name: sorted(sizes) for name, sizes in found.items()} == {"images": [0, 2], "mask": [0, 1], "ids": [1]}
    assert found["images"][0] is found["mask"][0]
    height, width = found["images"][2], found["mask"][1]
    assert (height.__name__, height.min, height.max) == ("height", 32, 512)
    assert (width.__name__, width.min) == ("width", 8)
    assert found["ids"][1] is Dim.AUTO


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "--dynamic is ''"),
        ("al", "did you mean all?"),
        ("images=batch", "'images=batch' is not input:dimension=name"),
        ("images:0=batch,", "'' is not input:dimension=name"),
        ("images:x=batch", "images:0=batch,images:2=height[32..512]"),
        ("images:2=height[512..32]", "has no size in its bounds"),
        ("images:2=height[32-512]", "is not input"),
        ("images:2=side[1..4],images:3=side[1..5]", "'side' has two different bounds"),
        ("images:0=a,images:0=b", "dimension 0 of 'images' is given twice"),
        ("images:0=auto[1..4]", "needs a name of its own"),
    ],
)
def test_what_is_written_otherwise_is_refused_with_an_example(text: str, said: str) -> None:
    with pytest.raises(InvalidInput) as error:
        read_dynamic(text)
    assert said in str(error.value)


def test_inputs_that_are_not_named_stay_as_they_are() -> None:
    assert for_all_inputs({"x": {0: 1}}, {"x": None, "y": None}) == {"x": {0: 1}, "y": None}
    with pytest.raises(InvalidInput, match="no input 'imges'; did you mean images"):
        for_all_inputs({"imges": {}}, {"images": None})
