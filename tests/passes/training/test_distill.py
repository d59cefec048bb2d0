"""Distillation against formulas in numpy, a teacher that is left as it was, and one that doesn't fit."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import lobo_fx
from lobo_fx.capture.tracing import trace
from lobo_fx.contracts.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.inputs import as_inputs
from lobo_fx.graph.program import Program
from lobo_fx.passes import Distill, FineTune, PruneChannels
from lobo_fx.passes.training.distill import _Imitation
from lobo_fx.passes.training.features import seeing
from lobo_fx.testing import assert_untouched

Array = npt.NDArray[np.float64]
IMAGES, LABELS = torch.randn(5, 3, 8, 8), torch.arange(5) % 4


class Net(nn.Module):
    def __init__(self, width: int = 6, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(width, 5, 3), nn.ReLU())
        self.head = nn.Linear(5, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(images)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(Net().eval(), IMAGES[:2])


def loss_of(
    program: Program, teacher: nn.Module, labels: Any = None, loss_fn: Any = None, inputs: Any = IMAGES, **settings: Any
) -> tuple[float, _Imitation]:
    """The loss of one batch, and what computed it."""
    distill = Distill(teacher=teacher, **settings)
    distill.check(program)
    context = Context(program.signature, loss_fn=loss_fn)
    with distill._sight(program.module, teacher) as (student, seen, taught, known):
        objective = _Imitation(program.module, student, taught, seen, known, distill, context)
        objective.prepare(program.example_inputs)
        return float(objective(as_inputs(inputs), labels).detach()), objective


def softmax(values: Array) -> Array:
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)  # type: ignore[no-any-return]


def divergence(mine: Array, theirs: Array, t: float) -> float:
    p, q = softmax(theirs / t), softmax(mine / t)
    return float((p * (np.log(p) - np.log(q))).sum(-1).mean() * t**2)


def array(value: torch.Tensor) -> Array:
    return value.detach().double().numpy()


@pytest.mark.parametrize("t", [1.0, 2.0, 7.5])
def test_logits_are_compared_by_divergence(program: Program, t: float) -> None:
    teacher = Net(9, seed=1).eval()
    mine, theirs = array(program.module(IMAGES)), array(teacher(IMAGES))
    found, _ = loss_of(program, teacher, temperature=t)
    assert found == pytest.approx(divergence(mine, theirs, t), rel=1e-4)
    assert found != pytest.approx(divergence(theirs, mine, t), rel=1e-3)


def test_labels_are_mixed_in(program: Program) -> None:
    teacher = Net(9, seed=1).eval()
    mine, theirs = array(program.module(IMAGES)), array(teacher(IMAGES))
    hard = -np.log(softmax(mine))[np.arange(5), LABELS.numpy()].mean()
    soft = divergence(mine, theirs, 2.0)
    found, _ = loss_of(program, teacher, LABELS, cross_entropy, label_share=0.4)
    assert found == pytest.approx(0.6 * soft + 0.4 * hard, rel=1e-5)
    for labels, loss_fn in ((LABELS, None), (None, cross_entropy)):  # one alone says nothing
        assert loss_of(program, teacher, labels, loss_fn)[0] == pytest.approx(soft, rel=1e-5)


def test_values_are_compared_by_squares(program: Program) -> None:
    teacher = Net(9, seed=1).eval()
    mine, theirs = array(program.module(IMAGES)), array(teacher(IMAGES))
    found, _ = loss_of(program, teacher, match="values")
    assert found == pytest.approx(((mine - theirs) ** 2).mean() / (theirs[:2] ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize("traced", [False, True])
def test_features_are_compared_and_projected_where_widths_differ(program: Program, traced: bool) -> None:
    net = Net(9, seed=1).eval()
    teacher = trace(net, IMAGES[:2]).module if traced else net
    logits = divergence(array(program.module(IMAGES)), array(net(IMAGES)), 2.0)
    student = Net().eval()
    student.load_state_dict(program.module.state_dict())
    given, wanted = array(student.body(student.stem(IMAGES))), array(net.body(net.stem(IMAGES)))
    body = ((given - wanted) ** 2).mean() / (wanted[:2] ** 2).mean()  # of the example inputs
    found, objective = loss_of(program, teacher, features=["body"], feature_share=0.7)
    assert found == pytest.approx(logits + 0.7 * body, rel=1e-5)
    assert not list(objective.projections)

    found, objective = loss_of(program, teacher, features={"stem": "stem", "body": "body"}, feature_share=0.7)
    (projection,) = objective.projections.values()
    turned = np.einsum("nchw,dc->ndhw", array(student.stem(IMAGES)), array(projection.weight))  # type: ignore[arg-type]
    wanted = array(net.stem(IMAGES))
    stem = ((turned - wanted) ** 2).mean() / (wanted[:2] ** 2).mean()
    assert found == pytest.approx(logits + 0.7 * (body + stem) / 2, rel=1e-5)
    again = loss_of(program, teacher, features=["stem"])[1].projections
    assert torch.equal(next(iter(again.parameters())), projection.weight)  # type: ignore[arg-type]


class Attending(nn.Module):
    def __init__(self, heads: int, groups: int, width: int, how: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.heads, self.groups, self.width, self.how = heads, groups, width, how
        self.query = nn.Linear(6, heads * width)
        self.key, self.value = nn.Linear(6, groups * width), nn.Linear(6, groups * width)
        self.out = nn.Linear(heads * width, 3)
        self.mask: torch.Tensor | None = None
        if how == "mask":
            self.mask = torch.tensor([[True, False, True, True]] * 3 + [[False] * 4])
        if how == "bias":
            self.mask = torch.randn(4, 4)
            self.mask[1, 2] = -torch.inf

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = (
            layer(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return query, key, value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.parts(x)
        attended = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=self.mask,
            is_causal=self.how == "causal",
            scale=0.3 if self.how == "scale" else None,
            enable_gqa=self.heads != self.groups,
        )
        return self.out(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def maps(self, x: torch.Tensor) -> Array:
        """Written out, head by head."""
        query, key, _ = map(array, self.parts(x))
        found = []
        for head in range(self.heads):
            shared = head // (self.heads // self.groups)
            scores = np.einsum("bqd,bkd->bqk", query[:, head], key[:, shared])
            scores = scores * (0.3 if self.how == "scale" else self.width**-0.5)
            if self.how == "causal":
                scores = np.where(np.tril(np.ones((4, 4), bool)), scores, -1e30)
            if self.mask is not None:
                mask = self.mask.numpy()
                scores = np.where(mask, scores, -1e30) if mask.dtype == bool else scores + np.maximum(mask, -1e30)
            found.append(softmax(scores))
        return np.mean(found, 0)  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, *settings: Any) -> None:
        super().__init__()
        self.attention = Attending(*settings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["plain", "causal", "mask", "bias", "scale"])
def test_attention_maps_are_those_of_an_explicit_softmax(how: str) -> None:
    x = torch.randn(2, 4, 6)
    for heads, groups in ((2, 2), (4, 2)) if how == "plain" else ((4, 2),):
        module = Block(heads, groups, 2, how, 0).eval()
        program = trace(module, x)
        with seeing(program.module, [("attention", "attention")]) as (shown, seen):
            assert torch.equal(shown(x), program.module(x))
            assert np.abs(array(seen["attention", "attention"]) - module.attention.maps(x)).max() < 1e-6


def test_attention_and_features_of_one_module_are_compared() -> None:
    x = torch.randn(2, 4, 6)
    student, teacher = (Block(heads, heads, width, "causal", heads).eval() for heads, width in ((2, 2), (4, 3)))
    program, taught = trace(student, x), trace(teacher, x)
    mine, theirs = student.attention.maps(x), teacher.attention.maps(x)
    rows = np.where(theirs > 0, theirs * (np.log(np.maximum(theirs, 1e-9)) - np.log(np.maximum(mine, 1e-9))), 0)
    outputs = array(student(x)), array(teacher(x))
    logits = divergence(*outputs, 2.0)
    relative = ((outputs[0] - outputs[1]) ** 2).mean() / (outputs[1] ** 2).mean()
    found, _ = loss_of(
        program, taught.module, inputs=x, attention=["attention"], features=["attention"], attention_share=0.5
    )
    assert found == pytest.approx(logits + 0.5 * rows.sum(-1).mean() + relative, rel=1e-4)


# --- the pass ---------------------------------------------------------------------------------------------


def distilled(program: Program | nn.Module, data: Any, loss_fn: Any = None, passes: Any = (), **settings: Any) -> Any:
    settings = {"learning_rate": 3e-3, "epochs": 3} | settings
    inputs = None if isinstance(program, Program) else IMAGES[:2]
    return lobo_fx.compile(
        program,
        [*passes, Distill(**settings)],
        example_inputs=inputs,
        train_data=data,
        loss_fn=loss_fn,
        progress=False,
    )


def test_a_cut_model_comes_nearer_to_the_original_without_labels(program: Program) -> None:
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    cut = PruneChannels({"stem*": 0.5}, round_to=1, compensation="none")
    pruned = lobo_fx.compile(program, [cut], progress=False)
    result = distilled(program, list(images.split(16)), passes=[cut], epochs=8, features=["stem", "body"])  # type: ignore[no-untyped-call]
    said = array(program.module(images))
    before, after = (divergence(array(found.module(images)), said, 2.0) for found in (pruned, result))
    assert after < 0.7 * before
    assert set(result.module.state_dict()) == set(pruned.module.state_dict())  # no projection is left
    labelled = distilled(program, list(zip(images.split(16), [torch.zeros(16).long()] * 4, strict=True)), passes=[cut])  # type: ignore[no-untyped-call]
    unlabelled = distilled(program, list(images.split(16)), passes=[cut])  # type: ignore[no-untyped-call]
    for name, value in unlabelled.module.state_dict().items():  # labels without a loss are none
        assert torch.equal(labelled.module.state_dict()[name], value)


class Signal(nn.Module):
    """Features of every layout: channels second of three dimensions, and last of four."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Sequential(nn.Conv1d(2, 12, 3), nn.BatchNorm1d(12), nn.ReLU(), nn.MaxPool1d(2))
        self.split, self.last = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv(x).transpose(1, 2).unflatten(1, (2, -1))
        return self.last(self.split(hidden).relu().mean((1, 2)))  # type: ignore[no-any-return]


def test_pruned_features_of_every_layout_are_projected() -> None:
    x = torch.randn(4, 2, 22)
    result = lobo_fx.compile(
        Signal().eval(),
        [PruneChannels(0.5, round_to=1), Distill(features=["conv", "conv.0", "split"], steps=2, learning_rate=1e-3)],
        example_inputs=x,
        train_data=[x],
        progress=False,
    )
    assert result.module.get_parameter("split.weight").shape == (8, 6)


class Tokens(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.count, self.up, self.head = count, nn.Linear(6, width), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x[:, : self.count])
        return self.head((hidden + hidden.relu()).mean(1))  # type: ignore[no-any-return]


def test_features_of_other_lengths_are_no_other_widths() -> None:
    x = torch.randn(2, 5, 6)
    student = trace(Tokens(5, 8).eval(), x)
    for count, width in ((4, 8), (4, 9)):
        with pytest.raises(InvalidInput, match=r"'up' gives \[2, 5, 8\], the teacher's .*: only widths may differ"):
            Distill(teacher=Tokens(count, width).eval(), features=["up"]).check(student)
    Distill(teacher=Tokens(5, 9).eval(), features=["up"]).check(student)


def test_the_teacher_is_left_as_it_was(program: Program) -> None:
    teacher = Net(9, seed=1).train()
    teacher.stem[1].eval()  # a mode of its own
    hooks = [dict(module._forward_hooks) for module in teacher.modules()]
    with assert_untouched(teacher):
        distilled(program, [IMAGES], teacher=teacher, features=["stem"])
    assert [dict(module._forward_hooks) for module in teacher.modules()] == hooks
    assert all(p.grad is None for p in teacher.parameters())

    def killed(outputs: Any, labels: Any) -> torch.Tensor:
        raise ZeroDivisionError

    with assert_untouched(teacher), pytest.raises(InvalidInput, match="loss_fn failed"):
        distilled(program, [(IMAGES, LABELS)], killed, teacher=teacher, features=["stem"])
    assert [dict(module._forward_hooks) for module in teacher.modules()] == hooks


def test_a_loss_without_labels_is_left_out(program: Program) -> None:
    with_loss, without = (distilled(program, [IMAGES], loss_fn=given) for given in (cross_entropy, None))
    for name, value in without.module.state_dict().items():
        assert torch.equal(with_loss.module.state_dict()[name], value)


def test_statistics_follow_the_module_to_another_device() -> None:
    program = trace(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval(), torch.randn(2, 6))
    chosen = Distill(features=["0"])
    with chosen._sight(program.module, program.clone().module) as (student, seen, taught, known):
        context = Context(program.signature)
        objective = _Imitation(program.module, student, taught, seen, known, chosen, context)
        objective.to_device(torch.float64)  # type: ignore[arg-type]  # as a device, it gives buffers anew
        running = dict(student.named_buffers())
        assert running
        for name, buffer in program.module.named_buffers():
            assert running[name] is buffer


def test_what_is_frozen_stays(program: Program) -> None:
    before = program.module.state_dict()
    result = distilled(program, [IMAGES], teacher=Net(9, seed=1), frozen=["stem*"])
    moved = {name for name, value in result.module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"body.0.weight", "body.0.bias", "head.weight", "head.bias"}


def test_a_killed_distillation_goes_on(program: Program, tmp_path: Path) -> None:
    settings = {"teacher": Net(9, seed=1), "features": ["stem"], "label_share": 0.5}
    data = [(IMAGES, LABELS)] * 2
    whole = distilled(program, data, cross_entropy, **settings).module.state_dict()
    calls = itertools.count()

    def dying(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if next(calls) == 3:
            raise KeyError
        return cross_entropy(outputs, labels)

    with pytest.raises(InvalidInput, match="loss_fn failed"):
        distilled(program, data, dying, checkpoint_dir=tmp_path, **settings)
    found = distilled(program, data, cross_entropy, checkpoint_dir=tmp_path, **settings).module.state_dict()
    assert all(torch.equal(whole[name], value) for name, value in found.items())
    assert next(calls) == 4


class TwoInputs(Net):
    def forward(self, images: torch.Tensor, more: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(images + more)


class Wide(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 7)


class Two(Net):
    def forward(self, images: torch.Tensor) -> Any:
        return super().forward(images), images


class Indices(Net):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images).argmax(1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher": Wide()}, "the teacher's outputs don't fit: it gives [(2, 7)], the model [(2, 4)]"),
        ({"teacher": Two()}, "the teacher's outputs don't fit"),
        ({"teacher": Indices()}, "the teacher's outputs don't fit: it gives []"),
        ({"teacher": TwoInputs()}, "the teacher can't be called as the model is: TypeError"),
        ({"teacher": nn.Linear(3, 4)}, "the teacher can't be called as the model is: RuntimeError"),
        ({"features": ["steem"]}, "there is no module 'steem'; did you mean stem"),
        ({"teacher": Net(9), "features": {"stem": "steem"}}, "the teacher has no module 'steem'; did you mean stem"),
        ({"teacher": Net(9), "features": {"stem": "body"}}, "'stem' gives [2, 6, 6, 6], the teacher's [2, 5, 4, 4]"),
        ({"attention": ["stem"]}, "there is no module with an attention 'stem'"),
        ({"teacher": Net(9), "attention": {"stem": "stem"}}, "there is no module with an attention"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_work(program: Program, settings: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(words)):
        distilled(program, [IMAGES], epochs=10**9, **settings)


class Fails(nn.Module):
    """A teacher that takes the example's rows, and fails on others or gives NaN."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 2 and self.words:
            raise RuntimeError(self.words)
        return images.mean((2, 3)) @ torch.ones(3, 4) * (math.nan if len(images) > 2 else 1)


@pytest.mark.parametrize(
    ("words", "told"),
    [("only two!", r"teacher failed at .*: RuntimeError: only two!"), ("", "the teacher gives NaN or infinity")],
)
def test_a_teacher_that_fails_on_a_batch_is_named(words: str, told: str, program: Program) -> None:
    with pytest.raises(InvalidInput, match=told):
        distilled(program, [IMAGES], epochs=1, learning_rate=1e-3, teacher=Fails(words))


def test_a_model_without_float_outputs_can_not_be_taught() -> None:
    with pytest.raises(InvalidInput, match="gives no float output"):
        distilled(Indices().eval(), [IMAGES])


# --- a model that gives its own loss ----------------------------------------------------------------------


def test_a_hugging_face_model_trains_on_its_own_loss() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    model = BertForSequenceClassification(config).eval()
    tokens = torch.randint(0, 30, (8, 5), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[:, 0] % 3}
    data: list[Mapping[str, Any]] = [
        {name: value[part] for name, value in batch.items()} for part in (slice(4), slice(4, 8))
    ]
    program = trace(model, batch)
    tuning: dict[str, Any] = {
        "learning_rate": 1e-3,
        "epochs": 2,
        "schedule": "constant",
        "warmup": 0.0,
        "clip_norm": None,
    }
    result = lobo_fx.compile(program, [FineTune(**tuning)], train_data=data, progress=False)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.01},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    for entry in data * 2:
        optimizer.zero_grad()
        model(**entry).loss.backward()
        optimizer.step()
    expected = model.state_dict()
    for name, value in result.module.state_dict().items():
        if "position_ids" not in name:
            assert (value - expected[name]).abs().max() < 2e-5, name

    alone, mixed = (
        lobo_fx.compile(
            program, [Distill(label_share=share, epochs=1, learning_rate=1e-3)], train_data=data, progress=False
        )
        for share in (0.0, 0.5)
    )
    # the teacher is the model itself: without labels there is nothing to learn
    moved = [
        max(
            float((value - program.module.state_dict()[name]).abs().max())
            for name, value in found.module.state_dict().items()
        )
        for found in (alone, mixed)
    ]
    assert moved[0] < moved[1]
    assert 1e-4 < moved[1] < 4e-3
