"""Batches of packed rows through grain, from any row on."""

from __future__ import annotations

from collections.abc import Iterator

import grain
import numpy as np

from llada2_jax.data.packing import PackedRows
from llada2_jax.types import Batch


def to_batch(fields: dict[str, np.ndarray]) -> Batch:
    """A Batch of host arrays from the fields that PackedRows yields, stacked."""
    return Batch(**fields)


def batches(
    rows: PackedRows, *, rows_per_step: int, first_step: int, prefetch: int = 2
) -> Iterator[Batch]:
    """Batches from step `first_step` on; rows are fetched ahead in threads.

    The rows of the run are shuffled by rows.seed. The data position of step s is place
    s · rows_per_step of that order: no iterator state has to be kept.
    """
    # Neighbouring rows are stretches of one document: a step of consecutive rows would be a
    # gradient of one file.
    dataset = grain.MapDataset.source(rows).shuffle(seed=rows.seed)
    dataset = dataset.slice(slice(first_step * rows_per_step, None))
    dataset = dataset.batch(rows_per_step, drop_remainder=True)
    options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=2 * prefetch)
    for fields in dataset.to_iter_dataset(options):
        yield to_batch(fields)


def validation_batches(rows: PackedRows, *, num_rows: int, rows_per_step: int) -> list[Batch]:
    """`num_rows` rows spread evenly over one epoch, in batches of equal shape.

    Raises: ValueError if the split holds fewer rows than asked for.
    """
    available = rows.epoch_tokens // rows.row_length
    if num_rows > available:
        raise ValueError(f"eval.rows={num_rows}, but the validation split holds {available} rows")
    if num_rows % rows_per_step:
        raise ValueError(f"eval.rows={num_rows} is not a multiple of {rows_per_step} rows a step")
    chosen = [rows[int(i)] for i in np.linspace(0, available - 1, num_rows)]
    groups = [chosen[i : i + rows_per_step] for i in range(0, num_rows, rows_per_step)]
    return [to_batch({k: np.stack([r[k] for r in g]) for k in g[0]}) for g in groups]
