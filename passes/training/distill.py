"""Distillation: the compressed model learns from what a teacher says."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import fx, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from lobo_fx.contracts.context import Context, users_code
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.layers import layer_of
from lobo_fx.graph.operators import aten
from lobo_fx.graph.program import Program
from lobo_fx.passes.training.features import Seen, output_nodes, seeing
from lobo_fx.passes.training.loop import train
from lobo_fx.passes.training.objective import Objective
from lobo_fx.passes.training.training_pass import TrainingPass, is_number

__all__ = ["Distill"]

_WHAT: tuple[Literal["features", "attention"], ...] = ("features", "attention")
Names = Mapping[str, str] | Sequence[str]
"""Names of modules that student and teacher both have, or a mapping from names in the student to the teacher's."""
Match = Literal["auto", "logits", "probabilities", "binary_logits", "binary_probabilities", "values"]

_LEAST = 1e-9
"""Smaller probabilities are raised to this one before their logarithm is taken."""
_SUM_TOLERANCE = 1e-2
"""How far a sum of probabilities may be from 1: in half precision it may be as far."""


@dataclasses.dataclass(frozen=True)
class Distill(TrainingPass):
    """Trains the model to say what a teacher says; labels help where there are any, and are not needed.

    Attributes:
        teacher: any module that takes the same inputs; None is the model before all passes.
        match: `logits` compares the distributions over the last dimension of each output; `probabilities`, outputs
            that are distributions already (after a softmax: classes, attention); `binary_logits` and
            `binary_probabilities` (after a sigmoid), every number on its own, as bits and labels that don't exclude
            each other; `values`, the outputs themselves (regression, embeddings). `auto` knows probabilities by their
            sum of 1 or the sigmoid that they come from, takes outputs of one dimension for `values`, and all others for
            `logits`; the report says what it took and why. One for all float outputs, or a list, one for each:
            `["values", "probabilities"]`.
        temperature: divides logits, so that the teacher's second choices count.
        label_share: how much the loss against labels counts, where there are labels and a loss; the rest is the
            teacher's.
        features: modules whose outputs are to match, `["layer1"]`, or a mapping from names in the student to the
            teacher's. Where widths differ, a projection is learned beside the student, and thrown away.
        feature_share: weight of all features together; the outputs' weight is 1.
        attention: modules whose attention is to match, averaged over heads.
        attention_share: weight of all attention maps together; the outputs' weight is 1.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; features: Romero et al., "FitNets",
        2015; attention: Jiao et al., "TinyBERT", 2020.

    Example:
        ```python
        chosen = [PruneChannels(0.5), Distill(epochs=3)]
        lobo_fx.compile(model, chosen, example_inputs=images, train_data=unlabelled)
        ```
    """

    teacher: nn.Module | None = None
    match: Match | Sequence[Match] = "auto"
    temperature: float = 2.0
    label_share: float = 0.3
    features: Names = ()
    feature_share: float = 1.0
    attention: Names = ()
    attention_share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is not None and not isinstance(self.teacher, nn.Module):
            raise InvalidInput(f"teacher is a {type(self.teacher).__name__}; expected an nn.Module, or None")
        known = get_args(Match)
        listed = isinstance(self.match, (str, list, tuple))
        if not listed or not self._given or any(match not in known for match in self._given):
            raise InvalidInput(f"match is {self.match!r}; it must be one of {', '.join(known)}, or a list of them")
        if not is_number(self.temperature) or self.temperature <= 0:
            raise InvalidInput(f"temperature is {self.temperature!r}; it must be a positive number")
        for name in ("label_share", "feature_share", "attention_share"):
            value = getattr(self, name)
            if not is_number(value) or value < 0 or (name == "label_share" and value > 1):
                raise InvalidInput(f"{name} is {value!r}; it must be a number of at least 0, label_share at most 1")
        for name in ("features", "attention"):
            value = getattr(self, name)
            named = isinstance(value, (list, tuple, Mapping))
            entries = [*value, *(value.values() if isinstance(value, Mapping) else ())] if named else []
            if not named or not all(isinstance(entry, str) for entry in entries):
                raise InvalidInput(f"{name} is {value!r}; it must be names of modules, or pairs of them")

    @property
    def needs(self) -> tuple[str, ...]:
        """Data alone; a score where training is to stop by it."""
        return ("train_data", *["evaluate"] * (self.patience is not None))

    def check(self, program: Program) -> None:
        """The teacher must take the inputs and give outputs that can be compared, and the modules must be there."""
        super().check(program)
        teacher = program.module if self.teacher is None else self.teacher
        with self._sight(program.module, teacher) as (student, seen, taught, known), torch.no_grad():
            outputs = _called(student, program.example_inputs)
            try:
                said = _called(taught, program.example_inputs)
            except Exception as error:
                raise InvalidInput(
                    f"the teacher can't be called as the model is: {type(error).__name__}: {error}"
                ) from error
        for wanted, match, _ in self._matches(outputs, said, program.module.graph):
            _check_match(wanted, match)
        self._width_dims(seen, known, program.module.graph)
        for name, other in self._paired("attention"):
            if seen["attention", name].shape != known["attention", other].shape:
                raise InvalidInput(_differing(name, seen["attention", name], known["attention", other], "no size"))

    def run(self, program: Program, context: Context) -> Program:
        assert context.original is not None
        teacher = context.original.module if self.teacher is None else self.teacher
        with self._sight(program.module, teacher) as (student, seen, taught, known):
            objective = _Imitation(program.module, student, taught, seen, known, self, context)
            objective.prepare(program.example_inputs)
            train(objective, self, context, lambda: program.lazy_clone().module)
        return program

    @property
    def _given(self) -> Sequence[Match]:
        return (self.match,) if isinstance(self.match, str) else self.match

    def _matches(self, outputs: Any, said: Any, graph: fx.Graph) -> list[tuple[torch.Tensor, Match, str]]:
        """The teacher's value of each output, how the student's is compared with it, and why if `match` is `auto`.

        Raises:
            InvalidInput: `match` is a list, and not as long as there are outputs.
        """
        wanted = [theirs for _, theirs in pairs(outputs, said)]
        given = [self.match] * len(wanted) if isinstance(self.match, str) else self.match
        if len(given) != len(wanted):
            raise InvalidInput(f"match names {len(given)} outputs; the model gives {len(wanted)} float outputs")
        leaves = pytree.tree_leaves(graph.output_node().args[0])
        nodes = [leaf for leaf in leaves if isinstance(leaf, fx.Node) and _is_compared(leaf.meta.get("val"))]
        return [
            (theirs, *(_found(theirs, node) if match == "auto" else (match, "")))
            for theirs, match, node in zip(wanted, given, nodes, strict=True)
        ]

    def _width_dims(self, seen: Seen, known: Seen, graph: fx.Graph) -> dict[str, int]:
        """The dimension of the widths of every feature whose width differs from the teacher's, by its name.

        Raises:
            InvalidInput: features differ in more than their widths.
        """
        nodes, found = output_nodes(graph), {}
        for name, other in self._paired("features"):
            mine, theirs = seen["features", name], known["features", other]
            if mine.shape == theirs.shape:
                continue
            differing = [
                dim for dim, (one, two) in enumerate(zip(mine.shape, theirs.shape, strict=False)) if one != two
            ]
            dim = _channel_dim(nodes[name])
            expected = [dim % mine.dim()] if dim is not None else differing[-1:]
            if mine.dim() != theirs.dim() or differing != expected or (dim is None and differing == [0]):
                raise InvalidInput(_differing(name, mine, theirs, "only widths"))
            found[name] = differing[0]
        return found

    def _paired(self, name: str) -> dict[tuple[str, str], None]:
        given = getattr(self, name)
        found = given.items() if isinstance(given, Mapping) else zip(given, given, strict=True)
        return dict.fromkeys(found)

    @contextlib.contextmanager
    def _sight(self, student: nn.Module, teacher: nn.Module) -> Iterator[tuple[nn.Module, Seen, nn.Module, Seen]]:
        """Both networks, the teacher in inference mode, and the features and attention maps of each."""
        wanted = [(what, *names) for what in _WHAT for names in self._paired(what)]
        in_student = [(what, mine) for what, mine, _ in wanted]
        in_teacher = [(what, theirs) for what, _, theirs in wanted]
        modes = {module: module.training for module in teacher.modules()}
        with seeing(student, in_student) as (mine, seen), seeing(teacher, in_teacher) as (theirs, known):
            theirs.eval()
            try:
                yield mine, seen, theirs, known
            finally:
                for module, training in modes.items():
                    module.training = training


class _Imitation(Objective):
    """The loss against a teacher, mixed with that against labels."""

    def __init__(
        self,
        module: nn.Module,
        student: nn.Module,
        teacher: nn.Module,
        seen: Seen,
        known: Seen,
        settings: Distill,
        context: Context,
    ) -> None:
        super().__init__(module, context)
        self.others = (student, teacher)  # in a tuple, they are no part of what is trained, copied or saved
        self.seen, self.known, self.settings = seen, known, settings
        self.projections = nn.ModuleDict()

    def to_device(self, device: torch.device) -> None:
        super().to_device(device)
        for other in self.others:
            other.to(device)
        # moving a module keeps its parameters but makes new buffers: the student must update the statistics that are
        # saved
        for name, buffer in self.module.named_buffers():
            path, _, last = name.rpartition(".")
            setattr(self.others[0].get_submodule(path), last, buffer)

    @property
    def running(self) -> nn.Module:
        return self.others[0]

    def train(self, mode: bool = True) -> _Imitation:
        """Sets the mode of the running student too, which only shares the module's parameters."""
        super().train(mode)
        self.others[0].train(mode)
        return self

    def prepare(self, inputs: Inputs) -> None:
        """Measures the teacher's values, and makes a projection for every feature whose widths differ.

        A difference counts as a share of the mean square of the teacher's values on these inputs. As shares of each
        batch's own mean square, the differences of several processes would not add up to that of one.
        """
        generator = self.context.generator()
        with torch.no_grad():
            _called(self.others[0], inputs)
            said = _called(self.others[1], inputs)
        self.scales = [_mean_square(value) for value in _float_outputs(said) if value.dim()]
        assert isinstance(self.module, fx.GraphModule)
        matches = self.settings._matches(said, said, self.module.graph)
        self.matches = [match for _, match, _ in matches]
        for number, (_, match, why) in enumerate(matches):
            if why:
                self.context.note(f"{self.settings.name}: output {number} is compared as {match}, {why}")
        self.feature_scales = {
            theirs: _mean_square(self.known["features", theirs]) for _, theirs in self.settings._paired("features")
        }
        self.width_dims = self.settings._width_dims(self.seen, self.known, self.module.graph)
        for mine, theirs in self.settings._paired("features"):
            if (dim := self.width_dims.get(mine)) is not None:
                given, wanted = self.seen["features", mine].shape[dim], self.known["features", theirs].shape[dim]
                self.projections[mine.replace(".", "/")] = _projection(given, wanted, generator)

    def forward(self, inputs: Inputs, labels: Any) -> torch.Tensor:
        student, teacher = self.others
        with torch.no_grad(), users_code("teacher"):
            said = _called(teacher, inputs)
        outputs = _called(student, inputs)
        settings, context = self.settings, self.context
        compared = [
            _difference(mine, theirs, match, scale, settings.temperature)
            for (mine, theirs), match, scale in zip(pairs(outputs, said), self.matches, self.scales, strict=True)
        ]
        loss = torch.stack(compared).sum()
        if (labels is not None) if context.loss_fn is not None else context.signature.gives_loss:
            loss = (1 - settings.label_share) * loss + settings.label_share * context.loss(outputs, labels)
        for mine, theirs in settings._paired("features"):
            given, wanted = self.seen["features", mine], self.known["features", theirs]
            if (dim := self.width_dims.get(mine)) is not None:
                given = self.projections[mine.replace(".", "/")](given.movedim(dim, -1)).movedim(-1, dim)
            squared = (given - wanted).square().mean() / self.feature_scales[theirs]
            loss = loss + settings.feature_share * squared / len(settings.features)
        for mine, theirs in settings._paired("attention"):
            given, wanted = self.seen["attention", mine], self.known["attention", theirs]
            entropy = (wanted * (wanted.clamp_min(1e-9).log() - given.clamp_min(1e-9).log())).sum(-1).mean()
            loss = loss + settings.attention_share * entropy / len(settings.attention)
        if not loss.isfinite() and not all(value.isfinite().all() for _, value in pairs(outputs, said)):
            raise InvalidInput("the teacher gives NaN or infinity on a batch of train_data")
        return loss


def _projection(given: int, wanted: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer that is the same in every run, so that a training that was killed can go on."""
    made = nn.Linear(given, wanted, bias=False)
    with torch.no_grad():
        made.weight.uniform_(-(given**-0.5), given**-0.5, generator=generator)
    return made


def _called(module: nn.Module, inputs: Inputs) -> Any:
    return module(*inputs.args, **inputs.kwargs)


def pairs(outputs: Any, said: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The float outputs of student and teacher, in order, but for scalars (losses), which are not compared.

    Raises:
        InvalidInput: they are not of the same shapes.
    """
    mine, theirs = _float_outputs(outputs), _float_outputs(said)
    shapes = [[tuple(value.shape) for value in found] for found in (mine, theirs)]
    if shapes[0] != shapes[1]:
        raise InvalidInput(f"the teacher's outputs don't fit: it gives {shapes[1]}, the model {shapes[0]}")
    found = [pair for pair in zip(mine, theirs, strict=True) if _is_compared(pair[0])]
    if not found:
        raise InvalidInput("the model gives no float output that could be compared with a teacher's")
    return found


def _float_outputs(outputs: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(outputs)
    return [value for value in leaves if isinstance(value, torch.Tensor) and value.is_floating_point()]


def _is_compared(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0


def _difference(
    mine: torch.Tensor, theirs: torch.Tensor, match: Match, scale: float, temperature: float
) -> torch.Tensor:
    """How far an output is from the teacher's; the gradient does not shrink as the temperature rises."""
    if match == "values":
        return (mine - theirs).square().mean() / scale
    if match == "probabilities":  # their logarithms are logits
        dim = _distribution_dim(theirs)
        mine, theirs = (value.movedim(dim, -1).clamp_min(_LEAST).log() for value in (mine, theirs))
    elif match == "binary_probabilities":
        mine, theirs = (torch.stack([value, 1 - value], -1).clamp_min(_LEAST).log() for value in (mine, theirs))
    elif match == "binary_logits":  # a sigmoid is a softmax beside zero
        mine, theirs = (torch.stack([value, torch.zeros_like(value)], -1) for value in (mine, theirs))
    given, wanted = ((value / temperature).log_softmax(-1).flatten(0, -2) for value in (mine, theirs))
    return functional.kl_div(given, wanted, reduction="batchmean", log_target=True) * temperature**2


def _distribution_dim(value: torch.Tensor) -> int:
    """The last dimension along which everything sums to 1.

    Raises:
        InvalidInput: there is none.
    """
    for dim in reversed(range(value.dim())):
        total = value.sum(dim)
        if bool((value >= 0).all()) and torch.allclose(total, torch.ones_like(total), atol=_SUM_TOLERANCE):
            return dim
    raise InvalidInput(
        f"match: the teacher's output of shape {list(value.shape)} holds no probabilities, which sum to 1 along "
        "a dimension; it may be logits, values, or probabilities of bits (binary_probabilities)"
    )


def _found(wanted: torch.Tensor, node: fx.Node) -> tuple[Match, str]:
    """How `auto` compares an output, and why."""
    if node.target is aten.sigmoid.default:
        return "binary_probabilities", "since it comes from a sigmoid"
    if wanted.dim() == 1:
        return "values", "since it has one dimension; say match='binary_logits' where its numbers are logits of bits"
    with contextlib.suppress(InvalidInput):
        return "probabilities", f"since the teacher's sum to 1 along dimension {_distribution_dim(wanted)}"
    return "logits", (
        "one distribution over the last dimension, since nothing tells it from logits of classes; say "
        "match='binary_logits' where its numbers are of bits or labels that don't exclude each other, 'values' where "
        "they are a regression"
    )


def _check_match(wanted: torch.Tensor, match: Match) -> None:
    """Refuses to compare outputs as distributions if they are none."""
    shape = list(wanted.shape)
    if (match == "logits" and shape[-1] == 1) or (match in ("logits", "probabilities") and len(shape) == 1):
        raise InvalidInput(
            f"match: the teacher's output of shape {shape} holds one number a row, and a distribution over one class "
            "says nothing: say match='binary_logits', 'binary_probabilities' or 'values'"
        )
    if match == "probabilities":
        _distribution_dim(wanted)
    if match == "binary_probabilities" and not ((wanted >= 0) & (wanted <= 1)).all():
        raise InvalidInput(
            f"match: the teacher's output of shape {shape} holds numbers outside of 0 to 1, which are no "
            "probabilities; before a sigmoid they are binary_logits"
        )


def _mean_square(value: torch.Tensor) -> float:
    return float(value.double().square().mean()) or 1.0


def _channel_dim(node: fx.Node) -> int | None:
    """The dimension of channels, from the end, by a layer that a value comes from; None where that is not known."""
    ahead, seen = [node], set()
    while ahead:
        source = ahead.pop()
        if source in seen or source.op != "call_function":
            continue
        seen.add(source)
        if (layer := layer_of(source)) is not None:
            return -1 - layer.kind.spatial_dims
        keeps = any(word in str(source.target) for word in ("norm", "pool", "dropout"))
        if keeps or torch.Tag.pointwise in getattr(source.target, "tags", ()):
            ahead += [one for one in source.all_input_nodes if _rank(one) == _rank(source)]
    return None


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else -1


def _differing(name: str, mine: torch.Tensor, theirs: torch.Tensor, what: str) -> str:
    return f"'{name}' gives {list(mine.shape)}, the teacher's {list(theirs.shape)}: {what} may differ"
