"""The forward kernel: the keys of one strip for the tiles of queries that see it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_attention.constants import MASKED
from pallas_kernels.block_attention.tpu.launch import NT, TN, Strip, dot, hide, launch
from pallas_kernels.block_attention.tpu.memory import FORWARD
from pallas_kernels.block_attention.tpu.schedule import ALIGNMENT, Tiles, visit_windows

EMPTY = MASKED / 2
"""The running maximum before any key: exp2(MASKED - EMPTY) is 0, so that hidden keys weigh nothing
even for a query that has seen none."""


def forward(strip: Strip, q, k, v, carry=()):
    """Attention over the strip, joined with the (output, lse) of the strips before it.

    Args:
      q: [batch, kv_heads, tiles, rows, head_dim], times head_dim**-0.5 * log2(e).
      k, v: [batch, kv_heads, keys, head_dim].
      carry: what this function returned for the strips before.

    Returns: output like q, fp32 if the row has several strips; lse fp32
      [batch, kv_heads, tiles, 1, rows], log2 of the softmax denominator.
    """
    rows, head_dim = q.shape[-2:]
    dtype = q.dtype if strip.count == 1 else jnp.float32
    return launch(
        functools.partial(_kernel, tiles=strip.tiles, carried=bool(carry)),
        strip,
        name="block_attention_forward",
        of=FORWARD,
        of_strip=(k, v),
        of_tile=(q,),
        carry=carry,
        tile_outputs=(
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((*q.shape[:3], 1, rows), jnp.float32),
        ),
        strip_outputs=(),
        scratch=[pltpu.VMEM((head_dim, rows), jnp.float32)],
    )


def _kernel(step, active, tile, runs, bounds, k, v, q, *refs, tiles: Tiles, carried: bool):
    """Scores are [keys, rows]: the softmax then reduces along sublanes, its statistics are row
    vectors, and so are the bounds of a window's mask."""
    *before, output, lse, sums = refs

    @pl.when(active)
    def _():
        rows = q.shape[0]
        if carried:
            sums[...] = before[0][...].T
            largest = before[1][...]
            total = jnp.where(largest > EMPTY, 1.0, 0.0)
        else:
            sums[...] = jnp.zeros_like(sums)
            largest = jnp.full((1, rows), EMPTY, jnp.float32)
            total = jnp.zeros((1, rows), jnp.float32)

        def visit(start, size, masked_run, state):
            largest, total = state
            keys = pl.ds(pl.multiple_of(start, ALIGNMENT), size)
            scores = dot(k[keys], q[...], NT)
            if masked_run is not None:
                scores = hide(scores, bounds[masked_run], start)
            new = jnp.maximum(largest, scores.max(0, keepdims=True))
            weights = jnp.exp2(scores - new)
            fade = jnp.exp2(largest - new)
            sums[...] = sums[...] * fade + dot(v[keys], weights.astype(v.dtype), TN)
            return new, total * fade + weights.sum(0, keepdims=True)

        largest, total = visit_windows(runs, tile, tiles, visit, (largest, total))
        total = jnp.where(total > 0, total, 1.0)
        output[...] = (sums[...] / total).T.astype(output.dtype)
        lse[...] = largest + jnp.log2(total)
