"""Reactions made from templates: which atom of the reactants every atom of the product was is known.

Molecules are scaffolds with a substituent and the group that reacts. Those of the test are others than those that are
learned from. RDKit applies the template and says where each atom came from.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rdkit import Chem, RDLogger
from rdkit.Chem import AllChem

__all__ = ["TOKENS", "Reaction", "reactions"]

TOKENS = re.compile(r"\[[^\]]+\]|Br|Cl|>>|%\d\d|[BCNOSPFIbcnosp]|[()=#\-+\\/:~.*\d@]")
"""Pieces of reaction SMILES: atoms, bonds, branches and rings."""
SCAFFOLDS = (
    *("{s}c1ccc({g})cc1", "{s}c1cccc({g})c1", "{s}c1ccccc1{g}", "{s}c1ccc({g})nc1", "{s}c1ccc({g})s1"),
    *("{s}c1ccc(C{g})cc1", "{s}c1cccc(CC{g})c1", "{s}C1CCC({g})CC1", "{s}CC{g}", "{s}CCC(C){g}"),
)
SUBSTITUENTS = ("C", "CC", "CC(C)", "CO", "F", "Cl", "FC(F)(F)", "N#C", "CN(C)", "COC(=O)", "CC(=O)", "O=C1CCCN1")
REAGENTS = ("", "CCN(CC)CC", "ClCCl", "CN(C)C=O", "C1CCOC1", "[K+].[OH-]", "CO")
ARYL = SCAFFOLDS[:5]
ALKYL = SCAFFOLDS[5:]
# By template, what its reactants are: the group that reacts, and the scaffolds that it may stand on.
TEMPLATES: dict[str, Sequence[tuple[str, Sequence[str]]]] = {
    "[C:1](=[O:2])[OX2H1].[NX3;H2;!$(NC=O):3]>>[C:1](=[O:2])[N:3]": (("C(=O)O", SCAFFOLDS), ("N", SCAFFOLDS)),
    "[C:1](=[O:2])[Cl].[OX2H1;!$(OC=O):3]>>[C:1](=[O:2])[O:3]": (("C(=O)Cl", SCAFFOLDS), ("O", SCAFFOLDS)),
    "[c:1][Br].[c:2][B](O)O>>[c:1][c:2]": (("Br", ARYL), ("B(O)O", ARYL)),
    "[CX3;H1:1](=O).[NX3;H2;!$(NC=O):2]>>[C:1][N:2]": (("C=O", SCAFFOLDS), ("N", SCAFFOLDS)),
    "[CX4:1][Br].[c:2][OX2H1:3]>>[c:2][O:3][C:1]": (("Br", ALKYL), ("O", ARYL)),
    "[S:1](=[O:2])(=[O:3])[Cl].[NX3;H2:4]>>[S:1](=[O:2])(=[O:3])[N:4]": (("S(=O)(=O)Cl", ARYL), ("N", SCAFFOLDS)),
    "[c:1][Br].[NX3;H2;!$(NC=O):2]>>[c:1][N:2]": (("Br", ARYL), ("N", SCAFFOLDS)),
    "[c:1][Br].[C:2]#[CX2;H1:3]>>[c:1][C:3]#[C:2]": (("Br", ARYL), ("C#C", SCAFFOLDS)),
    "[N:1]=[C:2]=[O:3].[NX3;H2:4]>>[N:1][C:2](=[O:3])[N:4]": (("N=C=O", SCAFFOLDS), ("N", SCAFFOLDS)),
    "[c:1][N+:2](=O)[O-]>>[c:1][NH2+0:2]": (("[N+](=O)[O-]", ARYL),),
    "[CX3;H1:1]=[O:2]>>[CH2:1][OH:2]": (("C=O", SCAFFOLDS),),
    "[N:1][C](=O)OC(C)(C)C>>[N:1]": (("NC(=O)OC(C)(C)C", SCAFFOLDS),),
}


@dataclasses.dataclass(frozen=True)
class Reaction:
    """A reaction whose atoms are known.

    Attributes:
        smiles: canonical, `reactants>>product`.
        tokens: its pieces.
        elements: atomic number of every atom, in the order of the tokens.
        neighbours: (atoms, atoms) which are bound to each other.
        classes: by atom of the reactants, a number that atoms share which no chemist could tell apart.
        truth: by atom of the product, the class that it came from; -1 where that is not known.
    """

    smiles: str
    tokens: tuple[str, ...]
    elements: np.ndarray[Any, Any]
    neighbours: np.ndarray[Any, Any]
    classes: np.ndarray[Any, Any]
    truth: np.ndarray[Any, Any]


def reactions(split: str, count: int, seed: int, longest: int) -> list[Reaction]:
    """Different reactions of one split, drawn at random; none has more than `longest` tokens."""
    generator = np.random.default_rng(seed)
    templates = [(AllChem.ReactionFromSmarts(smarts), blocks) for smarts, blocks in TEMPLATES.items()]
    found: dict[str, Reaction] = {}
    while len(found) < count:
        template, blocks = templates[int(generator.integers(len(templates)))]
        names = [_block(split, group, scaffolds, generator) for group, scaffolds in blocks]
        reaction = _react(template, names, str(generator.choice(REAGENTS)))
        if reaction is not None and len(reaction.tokens) <= longest:
            found[reaction.smiles] = reaction
    return list(found.values())


def _block(split: str, group: str, scaffolds: Sequence[str], generator: np.random.Generator) -> str:
    """A molecule with the group; of scaffold and substituent every third pair belongs to the test."""
    pairs = list(itertools.product(range(len(scaffolds)), range(len(SUBSTITUENTS))))
    own = [(a, b) for a, b in pairs if ((a + b) % 3 == 0) == (split == "test")]
    a, b = own[int(generator.integers(len(own)))]
    return scaffolds[a].format(s=SUBSTITUENTS[b], g=group)


def _react(template: Any, names: Sequence[str], reagent: str) -> Reaction | None:
    """The reaction; None where the template fits in more than one way, or gives no valid molecule."""
    RDLogger.DisableLog("rdApp.*")
    reactants = [Chem.MolFromSmiles(name) for name in names]
    made: dict[Any, Any] = {}
    for (product,) in template.RunReactants(tuple(reactants)):
        origins = [
            (a.GetPropsAsDict().get("react_idx"), a.GetPropsAsDict().get("react_atom_idx")) for a in product.GetAtoms()
        ]
        try:
            Chem.SanitizeMol(product)
        except Chem.MolSanitizeException:
            continue
        made.setdefault(Chem.MolToSmiles(product), (product, origins))
    if len(made) != 1:
        return None
    (smiles, (product, origins)), others = next(iter(made.items())), [part for part in reagent.split(".") if part]
    parts = sorted(
        [(Chem.MolToSmiles(mol), index, mol) for index, mol in enumerate(reactants)], key=lambda part: part[0]
    )
    before = [(text, index, mol) for text, index, mol in parts]
    before += [(Chem.MolToSmiles(mol), -1, mol) for mol in map(Chem.MolFromSmiles, others)]
    before.sort(key=lambda part: part[0])
    classes: list[int] = []
    by_origin: dict[tuple[int, int], int] = {}
    pieces: list[Any] = []
    for text, index, mol in before:
        ranks, offset = list(Chem.CanonicalRankAtoms(mol, breakTies=False)), 1000 * len(pieces)
        for atom in _written(mol):
            classes.append(offset + ranks[atom])
            by_origin[index, atom] = classes[-1]
        pieces.append((text, mol, _written(mol)))
    pieces.append((smiles, product, _written(product)))
    truth = [by_origin.get(origins[atom], -1) for atom in pieces[-1][2]]
    whole = f"{'.'.join(text for text, *_ in pieces[:-1])}>>{smiles}"
    tokens = tuple(TOKENS.findall(whole))
    assert "".join(tokens) == whole, whole
    elements, neighbours = _atoms(pieces)
    assert len(elements) == sum(map(is_atom, tokens))
    return Reaction(whole, tokens, elements, neighbours, np.array(classes), np.array(truth))


def is_atom(token: str) -> bool:
    """Whether a token stands for an atom."""
    return token[0].isalpha() or token[0] == "["


def _written(mol: Any) -> list[int]:
    """Atoms in the order in which the canonical SMILES, made last, names them."""
    Chem.MolToSmiles(mol)
    return list(mol.GetPropsAsDict(includePrivate=True, includeComputed=True)["_smilesAtomOutputOrder"])


def _atoms(pieces: Sequence[tuple[str, Any, list[int]]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Elements of all atoms as they are written, and which are bound to each other."""
    elements = [mol.GetAtomWithIdx(atom).GetAtomicNum() for _, mol, order in pieces for atom in order]
    neighbours = np.zeros((len(elements),) * 2, dtype=bool)
    start = 0
    for _, mol, order in pieces:
        end = start + len(order)
        neighbours[start:end, start:end] = Chem.GetAdjacencyMatrix(mol)[np.ix_(order, order)]
        start = end
    return np.array(elements), neighbours


def batches_of(found: Sequence[Reaction], size: int) -> Iterator[Sequence[Reaction]]:
    """Parts of a list."""
    yield from (found[start : start + size] for start in range(0, len(found), size))
