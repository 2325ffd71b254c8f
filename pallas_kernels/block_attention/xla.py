"""Attention as plain XLA operations: the CPU's path.

The keys come in parts (a cache and the block's own keys; the clean and the noisy half), so that
nothing is concatenated but the scores, and a clean query never meets a noisy key: of the (2L)²
pairs of a training row a quarter is not computed.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_attention.constants import MASKED
from pallas_kernels.block_layout import CLEAN, PADDING, BlockLayout, allowed


def attend_xla(
    q: Float[Array, "batch queries heads head_dim"],
    parts: Sequence[tuple[Array, Array, BlockLayout]],
    queries: BlockLayout,
) -> Float[Array, "batch queries heads head_dim"]:
    """As `attend_reference`, with scores in fp32 and the two matmuls in the inputs' dtype.

    Args:
      q: queries, laid out as `queries`.
      parts: (keys, values, layout), any number of [batch, keys, kv_heads, head_dim] pairs.
    """
    q = _hide_padding(q, queries)
    parts = [(_hide_padding(k, at), _hide_padding(v, at), at) for k, v, at in parts]
    parts = [single for part in parts for single in _spans(*part)]
    outputs, start = [], 0
    for layout in queries.split():
        (half, length), *_ = layout.spans
        seen = [p for p in parts if half == p[2].spans[0][0] or p[2].spans[0][0] == CLEAN]
        outputs.append(_attend(q[:, start : start + length], seen, layout))
        start += length
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def _hide_padding(x, layout):
    """Zeros where there is no document: what padding holds may be NaN, and 0 * NaN is NaN."""
    return jnp.where((layout.segment != PADDING)[:, :, None, None], x, jnp.zeros((), x.dtype))


def _spans(k, v, layout):
    """Cuts a part into single-half parts."""
    start = 0
    for single in layout.split():
        length = single.spans[0][1]
        yield k[:, start : start + length], v[:, start : start + length], single
        start += length


def _attend(q, parts, queries):
    """One softmax over all parts. Heads lead and a group's queries are stacked on the rows, so
    that the CPU sees few large matrix products instead of many small strided ones."""
    batch, length, heads, head_dim = q.shape
    kv_heads = parts[0][0].shape[2]
    rows = (q * jnp.asarray(head_dim**-0.5, q.dtype)).reshape(batch, length, kv_heads, -1, head_dim)
    rows = rows.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)
    scores = [
        jnp.matmul(rows, k.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
        for k, _, _ in parts
    ]
    mask = jnp.concatenate([allowed(queries, layout) for _, _, layout in parts], axis=-1)
    score = jnp.concatenate(scores, axis=-1).reshape(batch, heads, length, -1)
    weights = jax.nn.softmax(jnp.where(mask[:, None], score, MASKED), axis=-1).astype(q.dtype)
    weights = weights.reshape(batch, kv_heads, -1, weights.shape[-1])
    pieces, start = [], 0
    for k, v, _ in parts:
        pieces.append(weights[..., start : start + k.shape[1]] @ v.transpose(0, 2, 1, 3))
        start += k.shape[1]
    out = functools.reduce(operator.add, pieces)
    out = out.reshape(batch, heads, length, head_dim).transpose(0, 2, 1, 3)
    return jnp.where(mask.any(-1)[:, :, None, None], out, jnp.zeros((), q.dtype))
