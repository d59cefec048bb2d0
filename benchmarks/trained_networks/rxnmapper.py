"""The ALBERT of rxnmapper, which maps atoms of a product to those of the reactants by one of its attention heads.

Twelve layers share their weights; the map is read from head 5 of the eleventh (Schwaller et al., "Extraction of organic
chemistry grammar from unsupervised learning of chemical reactions", 2021). So the module that is compressed is what the
map needs: ten layers, and the queries and keys of that head. The score is the share of product atoms that are mapped
to the atom they came from, in reactions that templates make (`reactions`).

The head that is read is an output, so it is chosen in the module: the axis of heads then keeps its size by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tasks import Split
from torch import nn
from trained_report import Trial

from .network import Network, package_folder
from .reactions import Reaction, is_atom, reactions

__all__ = ["NETWORKS"]

LAYER, HEAD = 10, 5
"""Which attention rxnmapper reads, both counted from 0."""
NEIGHBOURS = 90.0
"""By what rxnmapper multiplies the attention between neighbours of atoms that are mapped to each other."""
LENGTH = 72
COUNTS = {"train": 2_500, "validation": 60, "test": 400}
_MODEL = "models/transformers/albert_heads_8_uspto_all_1310k"


class AtomAttention(nn.Module):
    """From tokens, 0 where there is none, to where the head looks: (reactions, tokens, tokens)."""

    def __init__(self, albert: Any) -> None:
        super().__init__()
        self.embeddings, self.widen = albert.embeddings, albert.encoder.embedding_hidden_mapping_in
        self.layer = albert.encoder.albert_layer_groups[0].albert_layers[0]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        seen = (tokens != 0)[:, None, None, :]  # (reactions, heads, queries, keys)
        hidden = self.widen(self.embeddings(tokens))
        for _ in range(LAYER):
            hidden = self.layer(hidden, seen)
        attention = self.layer.attention
        width = attention.attention_head_size
        query, key = (
            made(hidden).view(*hidden.shape[:2], -1, width)[:, :, HEAD] for made in (attention.query, attention.key)
        )
        scores = query @ key.mT * attention.scaling
        shares: torch.Tensor = scores.masked_fill(~seen[:, 0], -torch.inf).softmax(-1)
        return shares


def trained() -> tuple[AtomAttention, dict[str, int]]:
    """The network with the weights in the wheel, read as tensors alone, and its vocabulary."""
    from transformers import AlbertConfig, AlbertModel

    folder = package_folder("rxnmapper") / _MODEL
    settings = json.loads((folder / "config.json").read_text())
    known = AlbertConfig().to_dict().keys() & settings.keys() - {"architectures", "model_type"}
    config = AlbertConfig(**{name: settings[name] for name in known})
    config._attn_implementation = "sdpa"
    albert = AlbertModel(config, add_pooling_layer=False)
    weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    own = {name.removeprefix("albert."): value for name, value in weights.items() if name.startswith("albert.")}
    albert.load_state_dict({name: value for name, value in own.items() if not name.startswith("pooler.")})
    words = (folder / "vocab.txt").read_text().splitlines()
    return AtomAttention(albert).eval(), {word: index for index, word in enumerate(words)}


def encode(found: Sequence[Reaction], vocabulary: Mapping[str, int]) -> torch.Tensor:
    """Tokens as numbers, between a first and a last of the model's own, then zeros: (reactions, LENGTH)."""
    rows = torch.zeros(len(found), LENGTH, dtype=torch.long)
    for row, reaction in zip(rows, found, strict=True):
        words = ["[CLS]", *reaction.tokens, "[SEP]"]
        row[: len(words)] = torch.tensor([vocabulary.get(word, vocabulary["[UNK]"]) for word in words])
    return rows


def atom_map(reaction: Reaction, attention: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """By atom of the product, the atom of the reactants that it is mapped to; -1 where there is none.

    The pair of atoms of one element that look at each other most is mapped first; their neighbours then look at each
    other `NEIGHBOURS` times as much. Each atom is mapped once.

    Args:
        reaction: what was encoded.
        attention: (tokens, tokens), without the first and the last.
    """
    atoms = np.array([is_atom(token) for token in reaction.tokens])
    between = attention[np.ix_(atoms, atoms)]
    before = len(reaction.classes)
    weight = between[before:, :before] + between[:before, before:].T  # (product, reactants)
    weight = weight * (reaction.elements[before:, None] == reaction.elements[None, :before])
    found = np.full(len(weight), -1)
    for _ in range(len(weight)):
        share = weight / np.maximum(weight.sum(1, keepdims=True), np.finfo(weight.dtype).tiny)
        product, reactant = np.unravel_index(share.argmax(), share.shape)
        if share[product, reactant] <= 0:
            break
        found[product] = reactant
        near = np.ix_(reaction.neighbours[before + product, before:], reaction.neighbours[reactant, :before])
        weight[near] *= NEIGHBOURS
        weight[product], weight[:, reactant] = 0, 0
    return found


def share_mapped(module: nn.Module, tokens: torch.Tensor, found: Sequence[Reaction]) -> float:
    """Share of the product atoms that are mapped to the atom they came from, or to one that is like it."""
    module.eval()
    with torch.no_grad():
        attention = torch.cat([module(part) for part in torch.split(tokens, 50)]).double().numpy()
    right = known = 0
    for reaction, whole in zip(found, attention, strict=True):
        end = 1 + len(reaction.tokens)
        mapped = atom_map(reaction, whole[1:end, 1:end])
        is_known = reaction.truth >= 0
        known += int(is_known.sum())
        right += int(((mapped >= 0) & (reaction.classes[mapped] == reaction.truth) & is_known).sum())
    return right / known


def _network(counts: Mapping[str, int] = COUNTS) -> Network:
    module, vocabulary = trained()
    made = {
        split: reactions("test" if split == "test" else "train", counts[split], seed, LENGTH - 2)
        for seed, split in enumerate(("train", "validation", "test"))
    }
    splits = {split: Split(encode(found, vocabulary), torch.arange(len(found))) for split, found in made.items()}

    def score(found: nn.Module, part: Split) -> float:
        return share_mapped(found, part.inputs, [made["validation"][int(label)] for label in part.labels])

    with torch.no_grad():
        wanted = module(splits["test"].inputs)

    def tell(found: nn.Module) -> dict[str, Any]:
        inputs = splits["test"].inputs
        found.eval()
        with torch.no_grad():
            given = torch.cat([found(part) for part in torch.split(inputs, 50)])
        rows = inputs != 0
        return {
            "score": share_mapped(found, inputs, made["test"]),
            "attention moved": float((given - wanted).abs().sum(-1)[rows].mean() / 2),
        }

    trial = Trial(module, splits["train"], splits["validation"], splits["test"], None, score, batch=16)
    ends: Callable[[nn.Module], list[nn.Module]] = lambda copy: []  # noqa: E731
    # The stream that all layers add to stays whole: every layer norm takes its statistics over it, and what one layer
    # loses the same weights lose again in the next. Naming the layer that opens it names the stream.
    pruning = {"round_to": 1, "exclude": ["widen"], "importance": "activation"}
    training = {"steps": 150, "learning_rate": 3e-4}
    return Network(trial, tell, "atoms mapped right", "probabilities", training, ends, pruning)


NETWORKS: dict[str, Callable[..., Network]] = {"rxnmapper": _network}
