"""Random projection of gradients: a sparse Johnson-Lindenstrauss transform, made anew from a seed where it is needed.

Every coordinate of a gradient goes with a random sign to one random place in each of s blocks of the K results,
divided by sqrt(s) (Kane and Nelson, arXiv 1012.1577, the block construction). Inner products are kept in expectation;
for unit vectors x and y the variance of the projected product is at most (1 + <x, y>^2) / K, that of a dense matrix of
random signs as in LESS. It costs s multiplications per coordinate instead of K: with K = 8,192 a dense projection of
the organism's LoRA gradients would take longer than computing them.

TRAK's projector (`traker`, `fast_jl`) is a CUDA extension without a CPU path, and bergson brings its own gradient
collection and data handling; neither can project the layers of one model as they become ready, after the Adam
preconditioning. Projecting the two factors of a linear layer's gradient apart (LoGra, arXiv 2405.13954) is not possible
after an elementwise preconditioner.

Legend: K dimensions, B pairs, P LoRA parameters, n coordinates of a block, s nonzeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

NONZEROS = 4  # s
# Tables up to this size are kept instead of being made anew for each batch.
_TABLE_BYTES = 1 << 29
# Of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), as signed numbers: torch multiplies int64 modulo 2^64.
_GAMMA, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def splitmix64(counter: Tensor, seed: int) -> Tensor:
    """Random bits for each counter, int64 of any shape: the state number `counter` of the generator `seed`."""
    bits = (counter + 1) * _GAMMA + seed
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """A logical shift to the right: torch's own copies the sign bit."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


class SparseProjection:
    """The projection [P] -> [K] of one seed; the same numbers on every device, whatever the blocks.

    Args:
        size: K, a multiple of `NONZEROS`.
        seed: of the generator.
    """

    def __init__(self, size: int, seed: int) -> None:
        assert size > 0 and size % NONZEROS == 0
        self.size = size
        self._seed = int(splitmix64(torch.tensor(seed), 0))
        self._tables: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor, Tensor]] = {}
        self._bytes = 0

    def project(self, first: int, gradients: Tensor) -> Tensor:
        """The part that the coordinates `first` to `first + n` add to the projection.

        Args:
            first: number of the first coordinate.
            gradients: float32 [B, n].

        Returns:
            float32 [B, K].
        """
        coordinates, starts, signs = self._table(first, gradients.shape[1], gradients.device)
        # A sum of rows per place: gathered, not scattered, so that the order of summation is fixed on a GPU as well.
        bags = functional.embedding_bag(
            coordinates, gradients.T.contiguous(), starts, mode="sum", per_sample_weights=signs
        )
        return bags.T

    def _table(self, first: int, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates int64 [s n] in the order of their places, where each place begins [K], signs float32 [s n]."""
        key = (first, count, device)
        if key in self._tables:
            return self._tables[key]
        counters = torch.arange(first * NONZEROS, (first + count) * NONZEROS, device=device)
        bits = splitmix64(counters, self._seed)
        block = self.size // NONZEROS
        places = (counters % NONZEROS) * block + _shifted(bits, 33) % block
        signs = ((bits & 1) * 2 - 1) * NONZEROS**-0.5
        order = torch.argsort(places, stable=True)
        starts = torch.searchsorted(places[order], torch.arange(self.size, device=device))
        table = (order // NONZEROS, starts, signs[order].float())
        needed = sum(part.nbytes for part in table)
        if self._bytes + needed <= _TABLE_BYTES:
            self._bytes += needed
            self._tables[key] = table
        return table
