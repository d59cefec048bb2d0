"""The channel: a grid of symbols, each multiplied by a fading coefficient, with noise; some of them are known.

A slot is a grid of 8 times × 8 subcarriers. Its coefficients are jointly normal; neighbours are alike, by an
exponential correlation in time and in frequency. Eight places carry pilots, which the receiver knows; the others carry
four bits each, as a symbol of Gray-coded 16-QAM with the mean power 1.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..training import Split

SIDE, BITS = 8, 4
PILOTS = tuple((time, carrier) for time in (1, 5) for carrier in (0, 2, 5, 7))
TIME_CORRELATION, CARRIER_CORRELATION = 0.9995, 0.997
"""Of coefficients that stand beside each other."""
LOWEST_SNR, HIGHEST_SNR = 0.0, 30.0
"""In decibels; slots to train with are spread over the range."""
TEST_SNRS = (5.0, 10.0, 15.0, 20.0, 25.0)
TRAIN_SLOTS, TEST_SLOTS = 40_000, 2_000
_LEVELS = torch.tensor([-3.0, -1.0, 3.0, 1.0]) / 10**0.5
"""By the number that two bits make: neighbours differ in one bit (Gray)."""


def is_pilot() -> torch.Tensor:
    """Booleans (8, 8): where pilots stand."""
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    for time, carrier in PILOTS:
        mask[time, carrier] = True
    return mask


def constellation() -> tuple[torch.Tensor, torch.Tensor]:
    """The 16 symbols (16,), complex, and their bits (16, 4)."""
    bits = torch.tensor([[number >> shift & 1 for shift in (3, 2, 1, 0)] for number in range(16)])
    return modulated(bits), bits


def modulated(bits: torch.Tensor) -> torch.Tensor:
    """Symbols of bits (..., 4): two bits choose the real part, two the imaginary one."""
    return torch.complex(_LEVELS[2 * bits[..., 0] + bits[..., 1]], _LEVELS[2 * bits[..., 2] + bits[..., 3]])


def covariance() -> torch.Tensor:
    """Of the 64 coefficients of a slot, (64, 64), row by row."""
    apart = (torch.arange(SIDE)[:, None] - torch.arange(SIDE)).abs()
    return torch.kron(TIME_CORRELATION**apart, CARRIER_CORRELATION**apart)


def transmit(count: int, snr: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots as they arrive.

    Args:
        count: how many.
        snr: in decibels, (count,).
        generator: what bits, fading and noise are drawn from.

    Returns:
        What the receiver knows, (count, 5, 8, 8): real and imaginary part of the signal, of the pilots' coefficients
        as they were measured (zero elsewhere), and the noise's level in units of 10 dB; and the bits, (count, 4, 8, 8).
    """
    bits = torch.randint(0, 2, (count, SIDE, SIDE, BITS), generator=generator)
    symbols = modulated(bits)
    pilots = is_pilot()
    symbols[:, pilots] = 1.0
    root = torch.linalg.cholesky(covariance().double()).float().to(torch.complex64)
    fading = (_normal((count, SIDE * SIDE), generator) @ root.T).view(count, SIDE, SIDE)
    noise = 10 ** (-snr / 20)
    received = fading * symbols + noise[:, None, None] * _normal((count, SIDE, SIDE), generator)
    level = (-snr / 10)[:, None, None].expand(-1, SIDE, SIDE)
    measured = torch.where(pilots, received, 0)
    planes = (received.real, received.imag, measured.real, measured.imag, level)
    return torch.stack(planes, 1), bits.movedim(-1, 1).float()


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Complex normal numbers with the mean power 1."""
    return torch.complex(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)) / 2**0.5


def load(cache: Path, train_slots: int = TRAIN_SLOTS, test_slots: int = TEST_SLOTS) -> tuple[Split, Split]:
    """Training and test split: the same in every run, made in a second. Test slots stand SNR by SNR."""
    generator = torch.Generator().manual_seed(0)
    snr = torch.empty(train_slots).uniform_(LOWEST_SNR, HIGHEST_SNR, generator=generator)
    train = Split(*transmit(train_slots, snr, generator))
    generator.manual_seed(1)
    parts = [transmit(test_slots, torch.full((test_slots,), snr), generator) for snr in TEST_SNRS]
    return train, Split(torch.cat([inputs for inputs, _ in parts]), torch.cat([bits for _, bits in parts]))


def exact_bits(inputs: torch.Tensor) -> torch.Tensor:
    """Log-likelihood ratios of the bits, (count, 4, 8, 8): the best that the pilots allow, symbol by symbol.

    Given the pilots, the coefficients are normal with the mean and the covariance of linear regression, so that each
    symbol's likelihood is known exactly: y is normal with the mean h·x and the variance noise + |x|²·var(h).

    Args:
        inputs: as `transmit` gives them.
    """
    received = torch.complex(inputs[:, 0], inputs[:, 1]).flatten(1).to(torch.complex128)
    noise = 10 ** inputs[:, 4, 0, 0].double()
    pilots = is_pilot().flatten()
    known = covariance().double()
    symbols, bits = constellation()
    found = torch.empty(len(inputs), BITS, SIDE, SIDE)
    for level in torch.unique(noise):
        rows = noise == level
        inverse = torch.linalg.inv(known[pilots][:, pilots] + level * torch.eye(int(pilots.sum())))
        weights = known[:, pilots] @ inverse
        mean = received[rows][:, pilots] @ weights.T.to(torch.complex128)
        variance = known.diagonal() - (weights * known[:, pilots]).sum(1)
        spread = level + symbols.abs().double() ** 2 * variance[:, None]  # [64 places, 16 symbols]
        distance = (received[rows][..., None] - mean[..., None] * symbols).abs() ** 2
        likelihood = -distance / spread - spread.log()  # [slots, places, symbols]
        ratios = [
            likelihood[..., bits[:, bit] == 1].logsumexp(-1) - likelihood[..., bits[:, bit] == 0].logsumexp(-1)
            for bit in range(BITS)
        ]
        found[rows] = torch.stack(ratios, 1).view(-1, BITS, SIDE, SIDE).float()
    return found
