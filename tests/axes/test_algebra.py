"""The algebra of axes against brute force: what every single position is made of."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lobo_fx.axes.axis import Axis, AxisError, Form, concatenation, product, same
from lobo_fx.axes.removal import Removal, kept, kept_size, project
from lobo_fx.axes.unification import split_at, unify

Position = tuple[tuple[Axis, int], ...]
"""Which index of which leaves a position stands for; leaves of size 1 tell nothing."""


def times(factors: list[list[Position]]) -> list[Position]:
    """Oracle: row-major combinations."""
    return [tuple(itertools.chain(*combination)) for combination in itertools.product(*factors)]


def positions(axis: Axis) -> list[Position]:
    """Oracle: every position of an axis, in order."""
    root = axis.find()
    if root.form is Form.PRODUCT:
        return times([positions(part) for part in root.parts])
    if root.form is Form.CONCATENATION:
        return list(itertools.chain(*map(positions, root.parts)))
    return [()] if root.size == 1 else [((root, index),) for index in range(root.size)]


@dataclasses.dataclass(frozen=True)
class Tree:
    """An axis, and how it was put together: unification may refine that, never contradict it."""

    axis: Axis
    form: Form = Form.LEAF
    parts: tuple[Tree, ...] = ()

    def everything(self) -> list[Tree]:
        return [self, *itertools.chain(*(part.everything() for part in self.parts))]

    def leaves(self) -> list[Axis]:
        return [tree.axis for tree in self.everything() if tree.form is Form.LEAF]

    def check(self) -> None:
        """Every axis is still what it was made of."""
        for tree in self.everything():
            found = positions(tree.axis)
            assert len(found) == tree.axis.find().size
            parts = [positions(part.axis) for part in tree.parts]
            if tree.form is Form.PRODUCT:
                assert found == times(parts)
            elif tree.form is Form.CONCATENATION:
                assert found == list(itertools.chain(*parts))


def tree_of(draw: Callable[..., Any], size: int, pool: list[Tree], depth: int = 3) -> Tree:
    """A random axis of the given size; leaves are sometimes shared with what was drawn before."""
    forms = [Form.LEAF]
    divisors = [number for number in range(2, size) if size % number == 0]
    if depth and divisors:
        forms.append(Form.PRODUCT)
    if depth and size > 1:
        forms.append(Form.CONCATENATION)
    form = draw(st.sampled_from(forms))
    if form is Form.LEAF:
        known = [tree for tree in pool if tree.axis.size == size]
        if known and draw(st.integers(0, 1)):
            index: int = draw(st.integers(0, len(known) - 1))
            return known[index]
        pool.append(Tree(Axis(size)))
        return pool[-1]
    if form is Form.PRODUCT:
        outer = draw(st.sampled_from(divisors))
        parts = (tree_of(draw, outer, pool, depth - 1), tree_of(draw, size // outer, pool, depth - 1))
        return Tree(product(part.axis for part in parts), form, parts)
    head = draw(st.integers(1, size - 1))
    parts = (tree_of(draw, head, pool, depth - 1), tree_of(draw, size - head, pool, depth - 1))
    return Tree(concatenation(part.axis for part in parts), form, parts)


SIZES = st.sampled_from([2, 3, 4, 6, 8, 12, 16, 24, 36])


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    return tree_of(draw, draw(SIZES), [])


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tree, Tree]:
    size, pool = draw(SIZES), list[Tree]()
    return tree_of(draw, size, pool), tree_of(draw, size, pool)


def lines(*sizes: int) -> list[Axis]:
    return [Axis(size) for size in sizes]


def random_removal(leaves: list[Axis], seed: int) -> tuple[Removal, dict[Axis, npt.NDArray[Any]]]:
    """Masks for some of the leaves, as surgery takes them, and as numpy arrays for all of them."""
    generator = np.random.default_rng(seed)
    masks: dict[Axis, npt.NDArray[Any]] = {leaf: np.ones(leaf.size, dtype=bool) for leaf in leaves}
    for leaf in leaves:
        if leaf.size > 1 and generator.random() < 0.8:
            masks[leaf] = np.asarray(generator.random(leaf.size) < 0.6)
    return {leaf: torch.from_numpy(mask) for leaf, mask in masks.items() if not mask.all()}, masks


# --- construction ------------------------------------------------------------------------------------------


def test_a_product_flattens_and_forgets_factors_of_size_1() -> None:
    a, b, c = lines(2, 3, 4)
    nested = product([a, Axis(1), product([b, c])])
    assert nested.form is Form.PRODUCT
    assert nested.parts == (a, b, c)
    assert nested.size == 24
    assert product([Axis(1), a]) is a
    assert (product([]).size, product([]).form) == (1, Form.LEAF)


def test_a_concatenation_flattens_and_forgets_empty_pieces() -> None:
    a, b, c = lines(2, 3, 4)
    nested = concatenation([a, Axis(0), concatenation([b, c])])
    assert nested.form is Form.CONCATENATION
    assert nested.parts == (a, b, c)
    assert nested.size == 9
    assert concatenation([Axis(0), a]) is a


def test_a_product_of_concatenations_keeps_both() -> None:
    a, b, c = lines(2, 3, 4)
    assert str(product([concatenation([a, b]), c])) == "((2+3)*4)"
    assert str(concatenation([product([a, b]), c])) == "((2*3)+4)"


def test_a_locked_leaf_shows() -> None:
    a, b = lines(2, 3)
    a.lock("why")
    assert str(product([a, b])) == "(2!*3)"


# --- unification -------------------------------------------------------------------------------------------


def test_leaves_become_one() -> None:
    a, b, c = lines(4, 4, 4)
    unify(a, b)
    unify(c, a)
    assert a.find() is b.find() is c.find()
    assert same(a, c)
    assert unify(a, c) is a.find()


def test_a_leaf_takes_the_form_of_a_composite_from_either_side() -> None:
    for swapped in (False, True):
        a, b, leaf = lines(2, 3, 6)
        whole = product([a, b])
        unify(*((leaf, whole) if swapped else (whole, leaf)))
        assert leaf.find() is whole
        assert list(leaf.leaves()) == [a, b]
    a, b, leaf = lines(2, 3, 5)
    unify(leaf, concatenation([a, b]))
    assert list(leaf.leaves()) == [a, b]


def test_different_sizes_are_refused() -> None:
    with pytest.raises(AxisError, match="different sizes"):
        unify(Axis(4), Axis(6))


def test_products_meet_in_their_common_refinement() -> None:
    a, b, c, d = lines(4, 6, 2, 12)
    unify(product([a, b]), product([c, d]))
    assert [leaf.size for leaf in a.leaves()] == [2, 2]
    assert [leaf.size for leaf in d.leaves()] == [2, 6]
    assert next(a.leaves()) is c.find()
    assert list(a.leaves())[1] is next(iter(d.leaves()))
    assert list(d.leaves())[1] is b.find()


def test_everyone_who_holds_a_leaf_sees_its_refinement() -> None:
    shared, other = lines(6, 5)
    holder = product([other, shared])
    a, b = lines(2, 3)
    unify(shared, product([a, b]))
    assert list(holder.leaves()) == [other, a, b]
    assert positions(holder) == positions(product([other, a, b]))


def test_concatenations_meet_in_their_common_refinement() -> None:
    a, b, c, d = lines(2, 6, 5, 3)
    unify(concatenation([a, b]), concatenation([c, d]))
    assert [leaf.size for leaf in c.leaves()] == [2, 3]
    assert [leaf.size for leaf in b.leaves()] == [3, 3]
    assert next(iter(c.leaves())) is a.find()
    assert list(c.leaves())[1] is next(iter(b.leaves()))
    assert list(b.leaves())[1] is d.find()


def test_a_fused_qkv_ties_its_three_pieces() -> None:
    count, heads, width = lines(3, 4, 5)
    q, k, v = lines(20, 20, 20)
    unify(product([count, heads, width]), concatenation([q, k, v]))
    assert list(q.leaves()) == list(k.leaves()) == list(v.leaves()) == [heads, width]


def test_a_qkv_with_heads_outside_ties_nothing_but_the_heads() -> None:
    heads, three, width = lines(4, 3, 5)
    fused = Axis(60)
    unify(fused, product([heads, three, width]))
    q, rest = split_at(three, 1)
    k, v = split_at(rest, 1)
    assert [part.find().size for part in (q, k, v)] == [1, 1, 1]
    assert [leaf.size for leaf in fused.leaves()] == [4, 1, 1, 1, 5]


def test_a_channel_shuffle_meets_a_concatenation() -> None:
    """[c2 c2] → view [2, 4] → transpose → [4, 2], cut into halves: each half is 2 of the 4, times 2."""
    halves = lines(4, 4)
    groups, width = lines(2, 4)
    unify(concatenation(halves), product([groups, width]))
    assert halves[0].find() is halves[1].find() is width.find()
    head, tail = split_at(product([width, groups]), 4)
    assert [leaf.size for leaf in width.leaves()] == [2, 2]
    assert next(iter(head.leaves())) is next(iter(width.leaves()))
    assert next(iter(tail.leaves())) is list(width.leaves())[1]


def test_a_rotated_half_ties_the_two_halves() -> None:
    a, b = lines(4, 4)
    unify(concatenation([a, b]), concatenation([b, a]))
    assert a.find() is b.find()


@pytest.mark.parametrize("sizes", [((4, 6), (6, 4)), ((4, 9), (6, 6)), ((3, 4), (2, 6))])
def test_products_without_common_refinement_are_refused(sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    with pytest.raises(AxisError, match="no common refinement"):
        unify(product(lines(*sizes[0])), product(lines(*sizes[1])))


def test_a_product_cut_through_a_row_is_refused() -> None:
    with pytest.raises(AxisError, match="runs through"):
        unify(product(lines(2, 6)), concatenation(lines(5, 7)))


def test_a_failed_unification_leaves_no_contradiction() -> None:
    a, b, c = lines(2, 4, 6)
    d, e, f = lines(2, 6, 4)
    with pytest.raises(AxisError):
        unify(product([a, b, c]), product([d, e, f]))
    assert a.find() is d.find()
    assert len(positions(product([a, b, c]))) == 48
    assert b.find() is not f.find()


@settings(max_examples=50, deadline=None)
@given(pairs())
def test_unification_makes_positions_equal_and_contradicts_nothing(pair: tuple[Tree, Tree]) -> None:
    first, second = pair
    try:
        unify(first.axis, second.axis)
    except AxisError:
        assert first.form is not Form.LEAF
        assert second.form is not Form.LEAF
    else:
        assert positions(first.axis) == positions(second.axis)
        assert same(first.axis, second.axis)
    first.check()
    second.check()


@settings(max_examples=50, deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_products_of_refined_runs_always_meet(sizes: list[int], random: Any) -> None:
    """Both sides come from one list of prime factors, grouped in two ways: the refinement exists."""
    primes = [p for size in sizes for p, power in sorted(sympy.factorint(size).items()) for _ in range(power)]

    def grouped() -> list[Axis]:
        cuts = [0, *sorted(random.sample(range(1, len(primes)), random.randint(0, len(primes) - 1))), len(primes)]
        return [Axis(int(np.prod(primes[a:b]))) for a, b in itertools.pairwise(cuts)]

    left, right = product(grouped()), product(grouped())
    unify(left, right)
    assert positions(left) == positions(right)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 20), st.data())
def test_concatenations_of_leaves_always_meet(size: int, data: st.DataObject) -> None:
    def cuts() -> list[int]:
        return [0, *sorted(data.draw(st.sets(st.integers(1, size - 1)))), size]

    mine, theirs = cuts(), cuts()
    left, right = (concatenation([Axis(b - a) for a, b in itertools.pairwise(c)]) for c in (mine, theirs))
    unify(left, right)
    assert [leaf.size for leaf in left.leaves()] == list(np.diff(sorted({*mine, *theirs})))
    assert list(left.leaves()) == list(right.leaves())


# --- cutting -----------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(trees(), st.data())
def test_a_cut_gives_the_first_positions_and_the_others(tree: Tree, data: st.DataObject) -> None:
    size = tree.axis.find().size
    at = data.draw(st.integers(1, size - 1))
    try:
        head, tail = split_at(tree.axis, at)
    except AxisError:
        assert Form.PRODUCT in [part.form for part in tree.everything()]
    else:
        assert (positions(head), positions(tail)) == (positions(tree.axis)[:at], positions(tree.axis)[at:])
    tree.check()


@pytest.mark.parametrize("at", [0, 6, 7, -1])
def test_a_cut_outside_is_refused(at: int) -> None:
    with pytest.raises(AxisError, match="can't be split"):
        split_at(Axis(6), at)


def test_a_cut_of_a_product_on_a_row_cuts_its_outer_factor() -> None:
    outer, inner = lines(4, 3)
    head, tail = split_at(product([outer, inner]), 9)
    assert [leaf.size for leaf in outer.leaves()] == [3, 1]
    assert positions(head) == positions(product([outer, inner]))[:9]
    assert list(tail.leaves()) == [inner]


# --- locks and inexactness ---------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(pairs(), st.sampled_from(["lock", "mark_inexact"]), st.data())
def test_reasons_reach_exactly_the_leaves_that_theirs_became(
    pair: tuple[Tree, Tree], note: str, data: st.DataObject
) -> None:
    """Whatever is refined or merged into what: a leaf holds the reasons of every leaf it is part of, no others."""
    leaves = list(dict.fromkeys([*pair[0].leaves(), *pair[1].leaves()]))
    reasons = {leaf: f"reason {n}" for n, leaf in enumerate(leaves) if data.draw(st.booleans())}
    for leaf, reason in reasons.items():
        getattr(leaf, note)(reason)
    try:
        unify(pair[0].axis, pair[1].axis)
    except AxisError:
        return
    expected: dict[Axis, set[str]] = {}
    for leaf in leaves:
        for part in leaf.leaves():
            expected.setdefault(part, set()).update({reasons[leaf]} if leaf in reasons else ())
    for part, why in expected.items():
        assert set(part.locks) == (why if note == "lock" else set())
        assert set(part.inexact) == (why if note == "mark_inexact" else set())


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("note", ["lock", "mark_inexact"])
def test_reasons_survive_before_and_after_merging(note: str, late: bool) -> None:
    whole, (a, b) = Axis(6), lines(2, 3)
    if not late:
        getattr(whole, note)("why")
    unify(whole, product([a, b]))
    if late:
        getattr(whole, note)("why")
    field = "locks" if note == "lock" else "inexact"
    assert list(getattr(a, field)) == list(getattr(b, field)) == ["why"]
    assert whole.locked == (note == "lock")


def test_a_locked_factor_leaves_the_other_free() -> None:
    a, b, whole = *lines(2, 3), Axis(6)
    a.lock("why")
    unify(whole, product([a, b]))
    assert not whole.locked
    assert a.locked
    assert not b.locks


def test_a_lock_on_one_of_two_merged_leaves_holds_for_both() -> None:
    for index in (0, 1):
        pair = lines(4, 4)
        pair[index].lock("why")
        unify(*pair)
        assert pair[0].locked
        assert pair[1].locked


def test_a_refined_locked_leaf_stays_locked_in_all_parts() -> None:
    axis = Axis(6)
    axis.lock("why")
    head, tail = split_at(axis, 2)
    assert list(head.find().locks) == list(tail.find().locks) == ["why"]
    assert axis.locked


def test_a_leaf_of_size_1_counts_as_locked() -> None:
    assert Axis(1).locked
    assert not Axis(2).locked


def test_roles_are_kept_by_merging() -> None:
    a, b = lines(4, 4)
    a.mark("heads")
    b.mark("groups")
    unify(a, b)
    assert a.find().roles == {"heads", "groups"}


# --- masks and projections ---------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(trees(), st.integers(0, 2**16))
def test_kept_positions_are_those_whose_every_index_is_kept(tree: Tree, seed: int) -> None:
    removal, masks = random_removal(list(dict.fromkeys(tree.axis.leaves())), seed)
    expected = [all(masks[leaf][index] for leaf, index in position) for position in positions(tree.axis)]
    assert kept(tree.axis, removal).tolist() == expected
    assert kept_size(tree.axis, removal) == sum(expected)


@settings(max_examples=50, deadline=None)
@given(pairs(), st.integers(0, 2**16))
def test_unified_axes_keep_the_same_positions(pair: tuple[Tree, Tree], seed: int) -> None:
    try:
        unify(pair[0].axis, pair[1].axis)
    except AxisError:
        return
    leaves = [*pair[0].axis.leaves(), *pair[1].axis.leaves()]
    removal, masks = random_removal(list(dict.fromkeys(leaves)), seed)
    first, second = (kept(tree.axis, removal) for tree in pair)
    assert torch.equal(first, second)
    for leaf in pair[0].leaves():  # held since before the unification
        expected = [all(masks[part][index] for part, index in position) for position in positions(leaf)]
        assert kept(leaf, removal).tolist() == expected


def test_nothing_removed_keeps_everything() -> None:
    a, b = lines(2, 3)
    axis = product([a, b])
    assert kept(axis, {}).tolist() == [True] * 6
    assert kept_size(axis, {}) == 6
    removal = {b: torch.tensor([True, False, True])}
    assert kept(axis, removal).tolist() == [True, False, True, True, False, True]


@settings(max_examples=50, deadline=None)
@given(trees(), st.integers(0, 2**16))
def test_projection_sums_over_the_positions_with_an_index(tree: Tree, seed: int) -> None:
    """A position with two indices of one leaf (it is a factor twice) counts for both."""
    values: list[int] = [int(x) for x in np.random.default_rng(seed).integers(-9, 9, size=(tree.axis.find().size,))]
    for leaf in dict.fromkeys(tree.axis.leaves()):
        if leaf.size == 1:
            continue
        expected = np.zeros(leaf.size)
        for position, value in zip(positions(tree.axis), values, strict=True):
            for part, index in position:
                if part is leaf:
                    expected[index] += value
        found = project(tree.axis, leaf, torch.tensor(values, dtype=torch.float64))
        assert found.tolist() == expected.tolist()


def test_projection_on_a_foreign_leaf_is_zero() -> None:
    axis, foreign = product(lines(2, 3)), Axis(4)
    assert project(axis, foreign, torch.ones(6)).tolist() == [0, 0, 0, 0]


# --- free sizes --------------------------------------------------------------------------------------------


def symbols() -> tuple[Any, Any]:
    n, m = sympy.symbols("n m", integer=True, positive=True)
    return n, m


def test_free_sizes_are_factors_like_others() -> None:
    n, _ = symbols()
    rows, width = Axis(n), Axis(12)
    heads, each = lines(3, 4)
    unify(product([rows, width]), product([Axis(n), heads, each]))
    assert list(width.leaves()) == [heads, each]
    assert product([rows, width]).size == 12 * n


def test_a_free_size_divides_its_multiples() -> None:
    n, m = symbols()
    whole, rest = Axis(6 * n), Axis(m)
    unify(product([whole, rest]), product([Axis(n), Axis(2), Axis(3), Axis(m)]))
    assert [leaf.size for leaf in whole.leaves()] == [n, 2, 3]
    assert [type(leaf.size) for leaf in whole.leaves()][1:] == [int, int]


def test_a_free_size_is_not_taken_for_even() -> None:
    n, _ = symbols()
    with pytest.raises(AxisError, match="no common refinement"):
        unify(product([Axis(n), Axis(4)]), product([Axis(2), Axis(2 * n)]))


def test_free_sizes_of_different_names_differ() -> None:
    n, m = symbols()
    with pytest.raises(AxisError, match="different sizes"):
        unify(Axis(n), Axis(m))
    with pytest.raises(AxisError, match="no common refinement"):
        unify(product([Axis(n), Axis(m)]), product([Axis(m), Axis(n)]))


def test_free_sizes_are_not_cut_nor_compared() -> None:
    n, m = symbols()
    with pytest.raises(AxisError, match="can't be split"):
        split_at(Axis(n), 2)
    with pytest.raises(AxisError, match="longer"):
        unify(concatenation([Axis(n), Axis(m)]), concatenation([Axis(m), Axis(n)]))
    a, b = lines(2, 3)
    unify(concatenation([Axis(n), a]), concatenation([Axis(n), Axis(2)]))
    assert concatenation([Axis(n), b]).size == n + 3


def test_kept_sizes_of_free_sizes() -> None:
    n, _ = symbols()
    width = Axis(4)
    removal = {width: torch.tensor([True, False, False, True])}
    assert kept_size(product([Axis(n), width]), removal) == 2 * n
    assert kept_size(concatenation([Axis(n), width]), removal) == n + 2
