"""Stores the factors of several clients side by side, padded to common ranks.

A zero row of ``A`` beside a zero column of ``B`` gets a zero gradient, so padding stays zero.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from flexlora.lora.factors import AdapterState, LoraFactors

Trained = Literal["both", "A", "B", "none"]


Shape = tuple[int, int, int]
"""Rank, in_features and out_features of one module."""


class FactorBank:
    """Factors of several clients; one row of ``weights``, a slot, holds all those of a client.

    Attributes:
        shapes: Module path -> shape; a client's own ranks may be smaller.
        trained: The factors that get gradients.
        weights: [slots, columns], all ``A`` and then all ``B``.
        gradients: Of the trained columns; backward passes add to them.
    """

    def __init__(
        self, shapes: Mapping[str, Shape], trained: Trained, device: torch.device, *, keeps_starts: bool = False
    ) -> None:
        """Start without a slot; with ``keeps_starts``, remember what each client enters with."""
        self.shapes = dict(sorted(shapes.items()))
        self.trained: Trained = trained
        self._size_of_A = sum(rank * in_features for rank, in_features, _ in self.shapes.values())
        self.num_columns = sum(rank * (width + height) for rank, width, height in self.shapes.values())
        self._free: list[int] = []
        self._scalings = {path: torch.zeros(0, 1, 1, device=device) for path in self.shapes}
        self._starts = torch.zeros(0, self.num_columns, device=device) if keeps_starts else None
        self._resize(torch.zeros(0, self.num_columns, device=device))

    @property
    def num_slots(self) -> int:
        """Number of slots, used or free."""
        return self.weights.shape[0]

    @property
    def trained_weights(self) -> Tensor:
        """A view of the trained columns of ``weights``, valid until the next client enters."""
        return self.weights[:, self._trained_columns()]

    def fits(self, ranks: Mapping[str, int], trained: Trained, most_padding: float) -> bool:
        """Return whether factors of these ranks may enter, padded to at most ``most_padding`` times their size."""
        if trained != self.trained or ranks.keys() != self.shapes.keys():
            return False
        own = sum(rank * sum(self.shapes[path][1:]) for path, rank in ranks.items())
        return self.num_columns <= most_padding * own and all(
            rank <= self.shapes[path][0] for path, rank in ranks.items()
        )

    def enter(self, adapter: AdapterState) -> int:
        """Put copies of a client's factors into a free slot, and return the slot."""
        if not self._free:
            self._free = list(range(self.num_slots, max(1, 2 * self.num_slots)))[::-1]
            self._resize(_doubled(self.weights))
            self._starts = None if self._starts is None else _doubled(self._starts)
            self._scalings = {path: _doubled(scalings) for path, scalings in self._scalings.items()}
        slot = self._free.pop()
        self.weights[slot].zero_()
        for path, factors in adapter.items():
            A, B = self.factors[path]
            A[slot, : factors.rank] = factors.A.to(A.device)
            B[slot, :, : factors.rank] = factors.B.to(B.device)
            self._scalings[path][slot] = factors.scaling
        if self._starts is not None:
            self._starts[slot] = self.weights[slot]
        return slot

    def leave(self, slot: int, like: AdapterState) -> AdapterState:
        """Free a slot and return its factors at the ranks of ``like``: detached float32 copies on the CPU."""
        self._free.append(slot)
        adapter: dict[str, LoraFactors] = {}
        for path, entered in sorted(like.items()):
            A, B = self.factors[path]
            own_A, own_B = (
                factor.to("cpu", copy=True, memory_format=torch.contiguous_format)
                for factor in (A[slot, : entered.rank], B[slot, :, : entered.rank])
            )
            adapter[path] = LoraFactors(own_A, own_B, entered.scaling)
        return adapter

    def _trained_columns(self) -> slice:
        if self.trained == "none":
            return slice(0, 0)
        return slice(
            self._size_of_A if self.trained == "B" else 0, self._size_of_A if self.trained == "A" else self.num_columns
        )

    def start_factors(self, path: str) -> tuple[Tensor, Tensor]:
        """Return the ``A`` and ``B`` of a module with which the client of each slot entered."""
        assert self._starts is not None, "the bank was made with keeps_starts"
        return self._views(self._starts, path)

    def _views(self, weights: Tensor, path: str) -> tuple[Tensor, Tensor]:
        """Return views of [slots, columns] as [slots, rank, in_features] and [slots, out_features, rank]."""
        rank, in_features, out_features = self.shapes[path]
        start_A, start_B = self._offsets[path]
        return (
            weights[:, start_A : start_A + rank * in_features].unflatten(1, (rank, in_features)),
            weights[:, start_B : start_B + rank * out_features].unflatten(1, (out_features, rank)),
        )

    def _resize(self, weights: Tensor) -> None:
        self.weights = weights
        self.gradients = torch.zeros_like(self.trained_weights, memory_format=torch.contiguous_format)
        start_A, start_B = 0, self._size_of_A
        of_B = start_B if self.trained == "B" else 0
        self._offsets: dict[str, tuple[int, int]] = {}
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.factor_gradients: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        for path, (rank, in_features, out_features) in self.shapes.items():
            end_A, end_B = start_A + rank * in_features, start_B + rank * out_features
            self._offsets[path] = (start_A, start_B)
            self.factors[path] = self._views(weights, path)
            self.factor_gradients[path] = (
                self.gradients[:, start_A:end_A].unflatten(1, (rank, in_features))
                if self.trained in ("both", "A")
                else None,
                self.gradients[:, start_B - of_B : end_B - of_B].unflatten(1, (out_features, rank))
                if self.trained in ("both", "B")
                else None,
            )
            start_A, start_B = end_A, end_B

    def scalings(self, path: str) -> Tensor:
        """Return the scaling of each slot, as [slots, 1, 1]."""
        return self._scalings[path]


def _doubled(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_zeros(max(1, rows.shape[0]), *rows.shape[1:])])
