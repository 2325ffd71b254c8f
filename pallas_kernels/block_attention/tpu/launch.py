"""What the forward and the backward kernel share: a strip of keys, how a call walks over it, and
the arithmetic of one window."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from pallas_kernels.block_attention.constants import MASKED
from pallas_kernels.block_attention.tpu.memory import Pass, check_scalars
from pallas_kernels.block_attention.tpu.schedule import (
    TileBounds,
    Tiles,
    clip_to_strip,
    tile_runs,
    tiles_to_visit,
)

# Contracting dimensions of a dot: N takes a matrix as it is, T its transpose.
NN = ((1,), (0,))
NT = ((1,), (1,))
TN = ((0,), (0,))


def dot(a, b, contract):
    """Matrix product with an fp32 result; fp32 operands are not rounded on the way in."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def hide(scores, bounds, start):
    """Scores [keys, rows] of the keys from `start` on, MASKED outside the bounds [2, queries]."""
    keys, rows = scores.shape
    queries = bounds.shape[1]
    key = start + lax.broadcasted_iota(jnp.int32, (keys, queries), 0)
    inside = (key >= bounds[0:1]) & (key < bounds[1:2])
    return scores + jnp.tile(jnp.where(inside, 0.0, MASKED), (1, rows // queries))


@dataclasses.dataclass(frozen=True)
class Strip:
    """One kernel call's share of the keys, and the tiles of queries that see it.

    index: which strip. length: its keys. count: strips of the row. order, counts: the tiles to
    visit, by row. runs: their windows. bounds: the intervals, in keys of the strip.
    """

    index: int | Array
    length: int
    count: int
    order: Int[Array, "batch tiles"]
    counts: Int[Array, " batch"]
    runs: Int[Array, "batch tiles runs fields"]
    bounds: TileBounds
    tiles: Tiles
    interpret: bool

    @property
    def steps(self) -> int | Array:
        """Grid steps a row. The first strip visits every tile, and so initialises all outputs."""
        return self.order.shape[1] if self.is_first else self.counts.max()

    @property
    def is_first(self) -> bool:
        return isinstance(self.index, int)


def make_strip(index, length, count, bounds: TileBounds, tiles: Tiles, interpret: bool) -> Strip:
    """Strip number `index` (0, or traced) of `count`."""
    tiles = dataclasses.replace(tiles, wide=min(tiles.wide, length))
    bounds = clip_to_strip(bounds, index * length, length)
    runs = tile_runs(bounds, length, tiles)
    batch, number = runs.shape[:2]
    if isinstance(index, int):
        order = jnp.broadcast_to(jnp.arange(number, dtype=jnp.int32), (batch, number))
        counts = jnp.full((batch,), number, jnp.int32)
    else:
        order, counts = tiles_to_visit(runs)
    return Strip(index, length, count, order, counts, runs, bounds, tiles, interpret)


def launch(
    kernel: Callable,
    strip: Strip,
    *,
    name: str,
    of: Pass,
    of_strip: Sequence[Array],
    of_tile: Sequence[Array],
    carry: Sequence[Array],
    tile_outputs: Sequence[jax.ShapeDtypeStruct],
    strip_outputs: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
):
    """Runs `kernel` for every row, kv head and visited tile, in this order of loops.

    Args:
      of: what the call is the kernel of.
      kernel: called with (step of the row, whether it has work, tile, runs) and references to
        bounds, of_strip, of_tile, carry, tile_outputs, strip_outputs and scratch, without their
        leading axes.
      of_strip: [batch, kv_heads, keys, head_dim], resident for all tiles.
      of_tile: [batch, kv_heads, tiles, ...].
      carry: what the strips before left of the tile outputs, updated in place.
      tile_outputs, strip_outputs: likewise; the latter hold this strip only.
      scratch: VMEM of the kernel.
    """
    tiles, (batch, kv_heads, number, rows, head_dim) = strip.tiles, of_tile[0].shape
    prefetched = (jnp.full((1,), strip.index, jnp.int32), strip.order, strip.counts)
    runs = strip.runs.reshape(batch, 1, -1)
    check_scalars(
        f"the schedule of {batch} rows of {number} tiles",
        (*prefetched, runs[0], runs[0]),  # one row's runs at work, the next one's on their way
        "fewer rows a device, or larger Tiles.queries",
    )

    def tile_spec(x):
        shape = (None, None, None, *x.shape[3:])
        return pl.BlockSpec(shape, lambda b, h, i, strip, order, _: (b, h, order[b, i], 0, 0))

    def strip_spec(x):
        here = (lambda index: index[0]) if x.shape[2] > strip.length else (lambda index: 0)
        shape = (None, None, strip.length, x.shape[3])
        return pl.BlockSpec(shape, lambda b, h, i, index, order, _: (b, h, here(index), 0))

    in_specs = [
        pl.BlockSpec(
            (None, 1, runs.shape[-1]), lambda b, h, i, *_: (b, 0, 0), memory_space=pltpu.SMEM
        ),
        pl.BlockSpec(
            (None, None, *strip.bounds.shape[2:]),
            lambda b, h, i, index, order, _: (b, order[b, i], 0, 0, 0),
        ),
        *map(strip_spec, of_strip),
        *map(tile_spec, (*of_tile, *carry)),
    ]
    varies = jax.typeof(of_tile[0]).manual_axis_type  # over the mesh, inside a shard_map
    outputs = [x.update(manual_axis_type=varies) for x in (*tile_outputs, *strip_outputs)]
    vmem = strip.length * of.bytes_per_key(head_dim, of_strip[0].dtype)
    vmem += of.working_bytes(rows, head_dim, of_strip[0].dtype, tiles)
    first_carry = len(prefetched) + 2 + len(of_strip) + len(of_tile)

    def body(index, order, counts, runs, bounds, *refs):
        row, step = pl.program_id(0), pl.program_id(2)
        kernel(step, step < counts[row], order[row, step], runs, bounds, *refs)

    pairs = batch * kv_heads * number * rows * strip.length
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(batch, kv_heads, strip.steps),
            in_specs=in_specs,
            out_specs=[*map(tile_spec, tile_outputs), *map(strip_spec, strip_outputs)],
            scratch_shapes=scratch,
        ),
        out_shape=outputs,
        input_output_aliases={first_carry + i: i for i in range(len(carry))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * of.matmuls * pairs * head_dim // 4,
            transcendentals=pairs // 4,
            bytes_accessed=sum(
                math.prod(x.shape) * x.dtype.itemsize for x in (*of_strip, *of_tile, *outputs)
            ),
        ),
        interpret=strip.interpret,
        name=name,
    )(*prefetched, runs, strip.bounds, *of_strip, *of_tile, *carry)
