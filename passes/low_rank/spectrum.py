"""How much a layer's outputs lose at every rank of its weight, and the nearest weight of each rank.

With inputs X and S = XᵀX, a weight W₁ in place of W costs ‖X·(W − W₁)ᵀ‖² = ‖(W − W₁)·L‖², where S = L·Lᵀ. Of all W₁ of
rank r, the truncated singular value decomposition of W·L gives the least (Eckart and Young, 1936): with U the first r
left singular vectors, W₁·L = U·Uᵀ·W·L, so W₁ = U·Uᵀ·W. U are the eigenvectors of W·S·Wᵀ: no root of S is taken or
inverted, so S may have any rank.

Source: Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
    2024, who take L from Cholesky and invert it; Yuan et al., "ASVD: Activation-aware Singular Value Decomposition for
    Compressing Large Language Models", 2023, who take a diagonal.
"""

from __future__ import annotations

import dataclasses

import torch

from lobo_fx.passes.fitting.gram import Gram

__all__ = ["Spectrum", "spectrum"]


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """A weight decomposed along directions of its outputs, those of most energy first.

    Attributes:
        weight: (outputs, inputs).
        directions: orthonormal, (outputs, full rank).
        energies: energy of the outputs along each direction, (full rank,): squares of the weighted singular values.
    """

    weight: torch.Tensor
    directions: torch.Tensor
    energies: torch.Tensor

    @property
    def full(self) -> int:
        """The rank of any weight of this shape."""
        return len(self.energies)

    @property
    def errors(self) -> torch.Tensor:
        """The least energy that outputs lose at ranks 0, 1, … full: (full rank + 1,)."""
        tails = self.energies.flip(0).cumsum(0).flip(0)
        return torch.cat([tails, tails.new_zeros(1)])

    @property
    def shares(self) -> torch.Tensor:
        """The errors as shares of all energy; none where there is no energy to lose."""
        return (self.errors / self.errors[0]).nan_to_num(0.0)

    def rank_for(self, decibels: float) -> int:
        """The lowest rank, of at least 1, at which outputs have this signal-to-noise ratio."""
        enough = self.shares <= 10 ** (-decibels / 10)
        return max(1, int(enough.nonzero()[0])) if bool(enough.any()) else self.full

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest weight of a rank as `up @ down`: (outputs, rank) and (rank, inputs).

        A row of `down` and its column of `up` have the same norm, so that training and rounding treat both alike.
        """
        up = self.directions[:, :rank]
        down = up.mT @ self.weight
        root = down.norm(dim=1).sqrt()
        root = torch.where(root > 0, root, 1.0)
        return up * root, down / root.unsqueeze(1)

    def nearest(self, rank: int) -> torch.Tensor:
        """The nearest weight of a rank, (outputs, inputs)."""
        up = self.directions[:, :rank]
        return up @ (up.mT @ self.weight)


def spectrum(weight: torch.Tensor, gram: Gram | None = None) -> Spectrum:
    """Decomposes a weight.

    Args:
        weight: (outputs, inputs).
        gram: Gram matrix of the weight's inputs, one group; None weighs all inputs alike (plain singular values). A
            shrunk one (`Gram.shrunk`) also holds on rows that it has not seen.

    Example:
        ```python
        from lobo_fx.passes.fitting.gram import Gram
        from lobo_fx.passes.low_rank.spectrum import spectrum

        weight, rows = torch.randn(64, 32), torch.randn(1000, 32)
        found = spectrum(weight, Gram.of_rows(rows[None]))
        found.errors[8]  # ‖rows @ (weight − found.nearest(8)).T‖², and no weight of rank 8 has less
        ```
    """
    weight = weight.detach().double()
    # The outputs of a tall weight span at most as many dimensions as it has columns: solve that smaller problem.
    tall = weight.shape[0] > weight.shape[1]
    turn, core = torch.linalg.qr(weight) if tall else (None, weight)
    energies, directions = torch.linalg.eigh(_energy(core, gram))
    energies, directions = energies.flip(0).clamp_min(0), directions.flip(1)
    return Spectrum(weight, directions if turn is None else turn @ directions, energies)


def _energy(core: torch.Tensor, gram: Gram | None) -> torch.Tensor:
    """core·S·coreᵀ."""
    if gram is None:
        return core @ core.mT
    ridge = float(gram.ridge[0]) * (core @ core.mT)
    if gram.is_sum:
        return core @ gram.values[0] @ core.mT + ridge
    rows = gram.values[0] @ core.mT
    return rows.mT @ rows + ridge
