"""Work: query-key pairs that each backend computes, over the pairs that the mask allows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_attention import gpu, splash, tpu
from pallas_kernels.block_layout import KeyIntervals, key_intervals
from pallas_kernels.shapes import ATTENTION, packed_layout
from pallas_kernels.tables import Record

TARGETS = {"none": 1.10, 2048: 1.25, 1024: 1.40, 512: 1.70}
"""Most pairs over allowed pairs, by mean document length, at L = 4096 and block 32."""

Pairs = tuple[float, float]
"""(forward, backward), per query head, over all rows."""


def measure(
    lengths: Sequence[int],
    blocks: Sequence[int],
    documents: Sequence[str | int],
    *,
    anchor: str,
    rows: int,
) -> list[Record]:
    """One record a case: the ratio of every backend, forward and backward.

    lengths: clean tokens of a row; both halves attend. documents: "none", or mean lengths of
    exponentially distributed documents. anchor: of blocks, see `block_index`; blocks of documents
    straddle tiles, which a coarse tile pays for. rows: drawn for each case, always the same ones.
    """
    records = []
    for length in lengths:
        for block in blocks:
            for kind in documents:
                record = {"L": length, "block": block, "documents": kind}
                records.append(record | _ratios(length, block, kind, anchor, rows))
    return records


def _ratios(
    length: int, block: int, documents: str | int, anchor: str, rows: int
) -> dict[str, Any]:
    def intervals(documents) -> KeyIntervals:
        rng = np.random.default_rng(0)
        layout = packed_layout(rng, rows, length, documents, block_size=block, anchor=anchor)
        return key_intervals(layout)

    packed = intervals(documents)
    ideal = packed.pairs()
    counts: dict[str, Pairs] = {
        name: count(packed, 2 * length) for name, count in SCHEDULES.items()
    }
    counts["jax splash"] = splash.computed_pairs(intervals("none"), 2 * length)
    quarter = float(rows * length**2)
    counts["xla"] = 3 * quarter, 3 * quarter  # no clean query meets a noisy key
    counts["dense bias"] = 4 * quarter, 4 * quarter
    return {name: [round(x / ideal, 3) for x in pair] for name, pair in counts.items()}


def _gpu(implementation: gpu.Implementation, intervals: KeyIntervals, keys: int) -> Pairs:
    mini = ATTENTION["mini"]
    q = jax.ShapeDtypeStruct((1, keys, mini.heads, mini.head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, keys, mini.kv_heads, mini.head_dim), jnp.bfloat16)
    return gpu.computed_pairs(intervals, keys, gpu.default_tiles(implementation, q, k))


SCHEDULES: dict[str, Callable[[KeyIntervals, int], Pairs]] = {
    "tpu": tpu.computed_pairs,
    "mosaic": functools.partial(_gpu, "mosaic"),
    "triton": functools.partial(_gpu, "triton"),
    "splash": splash.computed_pairs,
}
"""Backends whose schedule follows the documents of each row."""
