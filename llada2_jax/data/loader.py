"""Batches of packed rows through grain, from any row on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from llada2_jax.data.mixing import Rows
from llada2_jax.types import Batch


def to_batch(fields: dict[str, np.ndarray]) -> Batch:
    """A Batch of host arrays from the fields that PackedRows yields, stacked."""
    return Batch(**fields)


@dataclasses.dataclass(frozen=True)
class _Share:
    """Some rows of each step, one step's after the other's."""

    rows: Rows
    rows_per_step: int
    share: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows) // self.rows_per_step * len(self.share)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step, place = divmod(int(index), len(self.share))
        return self.rows[step * self.rows_per_step + self.share[place]]


def batches(
    rows: Rows,
    *,
    rows_per_step: int,
    first_step: int,
    share: Sequence[int] | None = None,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Batches from step `first_step` on; fetched ahead in threads.

    Step s is rows [s · rows_per_step, (s + 1) · rows_per_step). share: which of them this process
    reads, from 0 (`sharding.local_rows`); default all. No iterator state has to be kept, and the
    number of processes may change.
    """
    share = range(rows_per_step) if share is None else share
    dataset = grain.MapDataset.source(_Share(rows, rows_per_step, tuple(map(int, share))))
    dataset = dataset.slice(slice(first_step * len(share), None))
    dataset = dataset.batch(len(share), drop_remainder=True)
    options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=2 * prefetch)
    for fields in dataset.to_iter_dataset(options):
        yield to_batch(fields)


def validation_batches(
    parts: Sequence[tuple[Rows, int]], *, num_rows: int, rows_per_step: int
) -> list[Batch]:
    """`num_rows` rows, of each part its share, spread evenly over one epoch, in batches of equal
    shape.

    Args:
      parts: rows of each source, and how many of them to take.

    Raises: ValueError if a split holds fewer rows than asked for.
    """
    if num_rows % rows_per_step:
        raise ValueError(f"eval.rows={num_rows} is not a multiple of {rows_per_step} rows a step")
    chosen = []
    for rows, wanted in parts:
        available = rows.epoch_rows
        if wanted > available:
            raise ValueError(f"eval.rows={wanted}, but the validation split holds {available} rows")
        chosen += [rows[int(i)] for i in np.linspace(0, available - 1, wanted)]
    groups = [chosen[i : i + rows_per_step] for i in range(0, num_rows, rows_per_step)]
    return [to_batch({k: np.stack([r[k] for r in g]) for k in g[0]}) for g in groups]
