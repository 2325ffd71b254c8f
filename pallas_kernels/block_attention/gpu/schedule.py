"""Which tiles a GPU kernel visits: ranges of tiles per tile, O(length / tile) of them.

A query's keys are `RUNS` runs of indices, of which it uses the first two or the third:

===========  ==================================================================
run 0, 1     a noisy query: its own block; the clean blocks before it
run 2        any query whose two runs touch (clean, MDLM): both of them as one
===========  ==================================================================

Keeping the third apart costs an empty range a tile and buys two things: the diagonal of a clean
query is visited once instead of once for each run, and *seen from a key* the queries of every run
are one range, so that the pass over the keys is as tight as the one over the queries.

A range of tiles is four bounds, first <= full_first <= full_last <= last: tiles in
[full_first, full_last) are allowed whole and take no mask, the rest of [first, last) is masked
exactly. Kernels walk the unmasked tiles of all runs first and then the masked ones, two plain
loops; `walk` maps a step of a loop to its run and tile.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels.block_attention.counting import count_at_most
from pallas_kernels.block_layout import KeyIntervals, one_program

RUNS = 3
BOUNDS = 4  # first, full_first, full_last, last

Bounds = Int[Array, "batch runs queries"]
TileRanges = Int[Array, "batch tiles runs 4"]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile of each kernel: (query positions, keys)."""

    forward: tuple[int, int]
    query_gradient: tuple[int, int]
    key_gradients: tuple[int, int]

    def multiples(self) -> tuple[int, int]:
        """What the numbers of queries and keys are padded to multiples of."""
        queries, keys = zip(*dataclasses.astuple(self), strict=True)
        return math.lcm(*queries), math.lcm(*keys)


@one_program
def runs_of(intervals: KeyIntervals) -> tuple[Bounds, Bounds]:
    """First and last-plus-one key of the RUNS of each query, int32; empty runs are 0, 0."""
    (own_start, own_end), (start, end) = intervals.own, intervals.earlier
    touching = end == own_start

    def keep(chosen, low, high):
        chosen = chosen & (high > low)
        return jnp.where(chosen, low, 0), jnp.where(chosen, high, 0)

    runs = (
        keep(~touching, own_start, own_end),
        keep(~touching, start, end),
        keep(touching, start, own_end),
    )
    starts, ends = (jnp.stack(bound, axis=1) for bound in zip(*runs, strict=True))
    return starts, ends


def seen_keys(starts: Bounds, ends: Bounds, keys: int) -> Bool[Array, "batch keys"]:
    """Keys that some query of the row sees."""
    begun, ended = (count_at_most(x.reshape(x.shape[0], -1), keys) for x in (starts, ends))
    return begun > ended


@functools.partial(one_program, static_argnames=("tile", "key_tile"))
def key_ranges(starts: Bounds, ends: Bounds, tile: int, key_tile: int) -> TileRanges:
    """Ranges of key tiles for each tile of `tile` queries (a divisor of their number)."""
    batch, runs, queries = starts.shape
    shape = (batch, runs, queries // tile, tile)
    starts, ends = starts.reshape(shape), ends.reshape(shape)
    nothing = ends <= starts
    first = jnp.where(nothing, jnp.iinfo(jnp.int32).max, starts).min(-1) // key_tile
    last = -(-jnp.where(nothing, 0, ends).max(-1) // key_tile)
    full_first = -(-starts.max(-1) // key_tile)
    full_last = ends.min(-1) // key_tile  # an empty run ends at 0: no tile is allowed whole
    return _ordered(first, full_first, full_last, last).swapaxes(1, 2)


@functools.partial(one_program, static_argnames="key_tiles")
def query_ranges(ranges: TileRanges, key_tiles: int) -> TileRanges:
    """The inverse of `key_ranges`: ranges of query tiles for each of the key tiles.

    Right for any intervals: a range spans all query tiles that visit the key tile, those inside it
    that do not are masked, and only tiles that are allowed whole go without a mask. Tight for those
    of a `BlockLayout`, whose bounds do not decrease from tile to tile.
    """
    first, full_first, full_last, last = jnp.moveaxis(ranges.swapaxes(1, 2), -1, 0)
    # Tile t may visit a key if some tile up to t ends behind it, and some from t on begins before.
    low = count_at_most(lax.cummax(last, axis=2), key_tiles)
    begins = jnp.where(first < last, first, key_tiles)
    high = count_at_most(lax.cummin(begins, axis=2, reverse=True), key_tiles)
    return _ordered(low, *_whole_run(full_first, full_last, key_tiles), high).swapaxes(1, 2)


def _whole_run(first, last, key_tiles: int):
    """One run of tiles [low, high) for each key tile, all of which hold it in [first, last)."""
    tiles = first.shape[2]
    some, index = first < last, jnp.arange(tiles, dtype=jnp.int32)
    ends, begins = jnp.where(some, last, key_tiles), jnp.where(some, first, 0)
    # From the last tile that ends before the key to the first that begins behind it, every tile
    # that holds anything holds the key. The run is there if, its ends apart, all of them do.
    low = count_at_most(lax.cummin(ends, axis=2, reverse=True), key_tiles)
    high = count_at_most(lax.cummax(begins, axis=2), key_tiles)
    after = lax.cummin(jnp.where(some, index, tiles), axis=2, reverse=True)
    before = lax.cummax(jnp.where(some, index + 1, 0), axis=2)
    low = _at(jnp.pad(after, ((0, 0), (0, 0), (0, 1)), constant_values=tiles), low)
    high = _at(jnp.pad(before, ((0, 0), (0, 0), (1, 0))), high)
    held = jnp.pad(jnp.cumsum(some, axis=2, dtype=jnp.int32), ((0, 0), (0, 0), (1, 0)))
    return low, jnp.where(_at(held, high) - _at(held, low) == high - low, high, low)


def _at(x, index):
    return jnp.take_along_axis(x, index, axis=2)


def _ordered(first, full_first, full_last, last) -> TileRanges:
    """Stacks the bounds so that they do not decrease; nothing to visit is 0, 0, 0, 0."""
    first = jnp.minimum(first, last)
    full_first = jnp.clip(full_first, first, last)
    full_last = jnp.clip(full_last, full_first, last)
    return jnp.stack([first, full_first, full_last, last], axis=-1)


def visited(ranges: TileRanges) -> Int[Array, ""]:
    """Number of tiles that the loops execute."""
    return (ranges[..., 3] - ranges[..., 0]).sum()


def whole_tiles(table) -> list:
    """(run, from, to) of the tiles without a mask; table[run][bound] are scalars."""
    return [(run, bound[1], bound[2]) for run, bound in enumerate(table)]


def masked_tiles(table) -> list:
    """(run, from, to) of the tiles that need one, before and after the whole ones."""
    before = [(run, bound[0], bound[1]) for run, bound in enumerate(table)]
    after = [(run, bound[2], bound[3]) for run, bound in enumerate(table)]
    return before + after


def steps(ranges):
    """Length of the walk over a list of (run, from, to)."""
    return sum(to - start for _, start, to in ranges)


def walk(ranges, step):
    """Run and tile of a step."""
    (run, tile, to), *rest = ranges
    done = to - tile
    run, tile = jnp.int32(run), tile + step
    for next_run, start, to in rest:
        here = step >= done
        run = jnp.where(here, next_run, run)
        tile = jnp.where(here, start + step - done, tile)
        done = done + to - start
    return run, tile
