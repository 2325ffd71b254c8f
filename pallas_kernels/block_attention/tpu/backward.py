"""The backward kernel: gradients of q, k and v in one pass over the windows.

A window costs five matmuls (scores, dv, dp, dk, dq). Two kernels, one with the queries outside and
one with the keys, would compute scores and dp twice: seven. One pass needs the gradients of keys
and values at hand for all tiles of queries, which they are: in VMEM, in fp32, next to the keys.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_attention.tpu.launch import NN, NT, TN, Strip, dot, hide, launch
from pallas_kernels.block_attention.tpu.memory import BACKWARD
from pallas_kernels.block_attention.tpu.schedule import ALIGNMENT, Tiles, visit_windows


def backward(strip: Strip, q, k, v, d_output, lse, delta, carry=()):
    """Gradients of the scores' operands from one strip.

    Args:
      q, k, v: as in `forward`.
      d_output: like q.
      lse: of all strips, as `forward` returned it last.
      delta: fp32 like lse, the sum of output * d_output over head_dim.
      carry: (d_q,) of the strips before.

    Returns: d_q like q, with respect to the unscaled query, fp32 if the row has several strips;
      d_k and d_v fp32 [batch, kv_heads, strip, head_dim], d_k with respect to log2(e) * k.
    """
    rows, head_dim = q.shape[-2:]
    of_strip = jax.ShapeDtypeStruct((*k.shape[:2], strip.length, head_dim), jnp.float32)
    dtype = q.dtype if strip.count == 1 else jnp.float32
    return launch(
        functools.partial(_kernel, tiles=strip.tiles, carried=bool(carry)),
        strip,
        name="block_attention_backward",
        of=BACKWARD,
        of_strip=(k, v),
        of_tile=(q, d_output, lse, delta),
        carry=carry,
        tile_outputs=(jax.ShapeDtypeStruct(q.shape, dtype),),
        strip_outputs=(of_strip, of_strip),
        scratch=[pltpu.VMEM((head_dim, rows), jnp.float32)],
    )


def _kernel(
    step, active, tile, runs, bounds, k, v, q, d_output, lse, delta, *refs, tiles: Tiles, carried
):
    *before, d_q, d_k, d_v, sums = refs

    @pl.when(step == 0)
    def _():
        d_k[...] = jnp.zeros_like(d_k)
        d_v[...] = jnp.zeros_like(d_v)

    @pl.when(active)
    def _():
        sums[...] = jnp.zeros_like(sums)

        def visit(start, size, masked_run, state):
            keys = pl.ds(pl.multiple_of(start, ALIGNMENT), size)
            scores = dot(k[keys], q[...], NT)
            if masked_run is not None:
                scores = hide(scores, bounds[masked_run], start)
            weights = jnp.exp2(scores - lse[...])
            d_scores = weights * (dot(v[keys], d_output[...], NT) - delta[...])
            d_scores = d_scores.astype(q.dtype)
            d_v[keys] += dot(weights.astype(q.dtype), d_output[...], NN)
            d_k[keys] += dot(d_scores, q[...], NN)
            sums[...] += dot(k[keys], d_scores, TN)
            return state

        visit_windows(runs, tile, tiles, visit, 0)
        total = sums[...].T * q.shape[-1] ** -0.5
        d_q[...] = (total + before[0][...] if carried else total).astype(d_q.dtype)
