"""The order of rows in a run: shuffled within each source, sources mixed by weight.

Both are pure functions of the row's number, so that the position in the data is one integer
whatever the number of processes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np

from llada2_jax.data.epochs import EpochPlans


class Rows(Protocol):
    """Endless rows by number. epoch_rows: how many of them an epoch fills."""

    @property
    def epoch_rows(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class ShuffledRows:
    """Rows shuffled among those of about the same epoch, so that epochs follow each other.

    Neighbouring rows are often stretches of one document: a step of consecutive rows would be a
    gradient of one file.
    """

    rows: Rows
    seed: int
    _orders: EpochPlans[np.ndarray] = dataclasses.field(
        default_factory=EpochPlans, init=False, repr=False, compare=False
    )

    @property
    def epoch_rows(self) -> int:
        return max(1, self.rows.epoch_rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        window, place = divmod(int(index), self.epoch_rows)
        start = window * self.epoch_rows
        return self.rows[start + int(self._orders.get(window, self._order)[place])]

    def _order(self, window: int) -> np.ndarray:
        return np.random.default_rng((self.seed, 2, window)).permutation(self.epoch_rows)


@dataclasses.dataclass(frozen=True)
class MixedRows:
    """Rows of several sources: of the first n rows each has given its share of n, rounded, for
    every n, so that also a step is mixed as the weights say.

    weights: positive. Each source gives its rows in its own order, from 0.
    """

    parts: tuple[Rows, ...]
    weights: tuple[float, ...]
    num_rows: int

    @property
    def epoch_rows(self) -> int:
        """Rows until the source that lasts longest has been seen once."""
        total = sum(self.weights)
        parts = zip(self.parts, self.weights, strict=True)
        return int(np.ceil(max(part.epoch_rows * total / w for part, w in parts)))

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        part, row = self.locate(int(index))
        return self.parts[part][row]

    def locate(self, index: int) -> tuple[int, int]:
        """(source, row of that source) of a row.

        Of the rows that reach a source, it takes its share of those still to be shared out, and
        lets the others pass. The number taken grows by one row at a time.
        """
        passed = index
        left = float(sum(self.weights))
        for part, weight in enumerate(self.weights[:-1]):
            share = weight / left
            taken = math.floor(passed * share)
            if math.floor((passed + 1) * share) > taken:
                return part, taken
            passed -= taken
            left -= weight
        return len(self.weights) - 1, passed

    def given(self, count: int) -> list[int]:
        """How many of the first `count` rows each source gives."""
        counts = []
        left = float(sum(self.weights))
        for weight in self.weights[:-1]:
            counts.append(math.floor(count * (weight / left)))
            count -= counts[-1]
            left -= weight
        return [*counts, count]
