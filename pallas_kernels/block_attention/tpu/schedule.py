"""Which keys each tile of queries visits: two runs of windows a tile, derived at run time.

A tile of neighbouring queries sees, in each of its two key intervals, a run of keys: the hull of
what its queries see. The hull is cut into windows of `Tiles.keys`. Windows that every query of the
tile sees completely need no mask and are taken several at a time; those left over, which fill no
wide step, are masked all the same: one loop fewer. What no query of a tile sees costs it nothing,
apart from the rest of the last window. So a row's schedule is `tiles x 2 runs x 4` integers:
O(length / tile), whatever the documents.

    hull of a run      [ first ................................. )
    windows            | m | m |    wide    |    wide    | m | m |       m: one window, masked
                       <- head ->                                        wide: several, no mask
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from pallas_kernels.block_attention.counting import count_at_most
from pallas_kernels.block_layout import KeyIntervals, one_program

RUNS = 2  # key intervals of a query
FIELDS = 4  # integers that describe a run: first, head, wides, windows
ALIGNMENT = 16  # windows begin on multiples of a bf16 sublane tile

TileBounds = Int[Array, "batch tiles runs 2 tile_queries"]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes that trade computed pairs against the length of the inner steps.

    queries: positions of a tile; a kv head's query heads are stacked on top of each other, so that
      a matmul has `queries x group` rows. A multiple of 128.
    keys: keys of a masked window. A multiple of 128.
    wide: keys of an unmasked step. A multiple of `keys`.
    vmem_bytes: VMEM that a kernel call may ask for, which decides how many keys it holds
      (`memory`). None: what a core of the chip has.
    """

    queries: int = 128
    keys: int = 128
    wide: int = 512
    vmem_bytes: int | None = None

    def __post_init__(self):
        for name in ("queries", "keys"):
            if getattr(self, name) <= 0 or getattr(self, name) % 128:
                raise ValueError(f"Tiles.{name}={getattr(self, name)}: a positive multiple of 128")
        if self.wide <= 0 or self.wide % self.keys:
            raise ValueError(f"Tiles.wide={self.wide}: a positive multiple of keys={self.keys}")


@functools.partial(one_program, static_argnames="tiles")
def tile_bounds(intervals: KeyIntervals, tiles: Tiles) -> TileBounds:
    """TileBounds [start, end) of both runs of every query, by tile. Queries added to fill the last
    tile have no keys.

    Two intervals that touch become one, so that no tile visits a window once for each.
    """
    (own_start, own_end), (start, end) = intervals.own, intervals.earlier
    touch = end == own_start
    empty = jnp.zeros_like(start)
    runs = (
        (start, jnp.where(touch, own_end, end)),
        (jnp.where(touch, empty, own_start), jnp.where(touch, empty, own_end)),
    )
    bounds = jnp.stack([jnp.stack(run, axis=1) for run in runs], axis=1)
    batch, *_, length = bounds.shape
    count = pl.cdiv(length, tiles.queries)
    bounds = jnp.pad(bounds, ((0, 0), (0, 0), (0, 0), (0, count * tiles.queries - length)))
    bounds = bounds.reshape(batch, RUNS, 2, count, tiles.queries)
    return bounds.transpose(0, 3, 1, 2, 4)


@functools.partial(one_program, static_argnames=("keys", "tiles"))
def tile_runs(bounds: TileBounds, keys: int, tiles: Tiles) -> Int[Array, "batch tiles runs fields"]:
    """The windows of every tile and run; `keys`, the keys present, is a multiple of tiles.keys.

    first: where the first window begins, a multiple of ALIGNMENT. head: masked windows before the
    wide steps. wides: unmasked steps. windows: all windows, those inside the wide steps included.
    """
    start, end = bounds[..., 0, :], bounds[..., 1, :]
    seen = end > start
    low = jnp.where(seen, start, keys).min(-1) // ALIGNMENT * ALIGNMENT
    high = jnp.where(seen, end, 0).max(-1)
    windows = jnp.maximum(pl.cdiv(high - low, tiles.keys), 0)
    first = jnp.minimum(low, keys - windows * tiles.keys)  # the last window ends inside the keys
    head = pl.cdiv(jnp.maximum(start.max(-1) - first, 0), tiles.keys)
    tail = (end.min(-1) - first) // tiles.keys
    wides = jnp.maximum(tail - head, 0) // (tiles.wide // tiles.keys)
    return jnp.stack([first, head, wides, windows], axis=-1)


def clip_to_strip(bounds: TileBounds, begin: int | Array, length: int) -> TileBounds:
    """TileBounds relative to the strip of keys [begin, begin + length)."""
    return jnp.clip(bounds - begin, 0, length)


@one_program
def tiles_to_visit(
    runs: Int[Array, "batch tiles runs fields"],
) -> tuple[Int[Array, "batch tiles"], Int[Array, " batch"]]:
    """The tiles with work in every row, in order, and how many they are; the last one repeats.

    A row without any names one tile all the same: what the kernel carries on is written by visits.
    """
    done = jnp.cumsum(runs[..., 3].sum(-1) > 0, axis=1, dtype=jnp.int32)
    counts = jnp.maximum(done[:, -1], 1)
    visit = jnp.arange(done.shape[1], dtype=jnp.int32)
    visit = jnp.minimum(visit, counts[:, None] - 1)
    # The n-th tile with work has n of them before it. A sort would take the compiler 13 s.
    order = jnp.take_along_axis(count_at_most(done, done.shape[1]), visit, axis=1)
    return jnp.minimum(order, done.shape[1] - 1), counts


def visit_windows(
    runs_ref: Any,
    tile: Array,
    tiles: Tiles,
    visit: Callable[[Array, int, Array | None, Any], Any],
    state: Any,
) -> Any:
    """Calls `visit(start, size, masked run or None, state) -> state` for all windows of a tile.

    Inside a kernel. runs_ref: the row's `tile_runs`, flat, in scalar memory.
    """

    def one_run(run, state):
        at = (tile * RUNS + run) * FIELDS
        first, head, wides, windows = (runs_ref[0, at + i] for i in range(FIELDS))
        inside = wides * (tiles.wide // tiles.keys)

        def wide(i, state):
            return visit(first + head * tiles.keys + i * tiles.wide, tiles.wide, None, state)

        def masked(i, state):
            window = i + jnp.where(i < head, 0, inside)
            return visit(first + window * tiles.keys, tiles.keys, run, state)

        state = lax.fori_loop(0, wides, wide, state)
        return lax.fori_loop(0, windows - inside, masked, state)

    return lax.fori_loop(0, RUNS, one_run, state)


def count_pairs(intervals: KeyIntervals, keys: int, strip: int, tiles: Tiles) -> int:
    """Query-key pairs of one query head that the schedule computes, masked ones included.

    strip: keys that a kernel call holds.
    """
    bounds = tile_bounds(intervals, tiles)
    total = 0
    for begin in range(0, keys, strip):
        runs = tile_runs(clip_to_strip(bounds, begin, strip), strip, tiles)
        total += int(jax.device_get(runs[..., 3].sum()))
    return total * tiles.keys * tiles.queries
