"""Decode attention as plain XLA operations: the CPU's path, and any accelerator's fallback.

The cache is read in chunks up to the longest sequence of the batch, not to its capacity. Forward
only: the number of chunks is data, which reverse-mode differentiation cannot follow.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.block_attention.decode.cache import Cache, PagedCache
from pallas_kernels.block_attention.decode.online_softmax import attend, no_keys, output

_CHUNK = 128  # keys a step


def decode_xla(
    q: Float[Array, "batch kv_heads rows head_dim"],
    k: Float[Array, "batch kv_heads own head_dim"],
    v: Float[Array, "batch kv_heads own head_dim"],
    mask: Bool[Array, "batch own own"],
    cache: Cache,
) -> Float[Array, "batch kv_heads rows head_dim"]:
    """As `api.decode_attention`, of queries that are scaled and stacked as `api` does it."""
    own = jnp.tile(mask, (1, q.shape[2] // mask.shape[1], 1))[:, None]
    width = _chunk_width(cache)

    def step(i, state):
        keys, values, positions = _chunk(cache, i, width)
        # The last chunk is moved back to fit: what it shares with the one before is not new.
        inside = (positions >= i * width) & (positions < cache.lengths[:, None])
        values = jnp.where(inside[:, None, :, None], values, jnp.zeros((), values.dtype))
        return attend(state, q, keys, values, inside[:, None, None])

    state = attend(no_keys(q.shape), q, k, v, own)
    chunks = -(-jnp.max(cache.lengths) // width)
    return output(jax.lax.fori_loop(0, chunks, step, state))


def _chunk_width(cache: Cache) -> int:
    if isinstance(cache, PagedCache):
        pages = min(max(_CHUNK // cache.page_size, 1), cache.page_table.shape[1])
        return pages * cache.page_size
    return min(_CHUNK, cache.capacity)


def _chunk(
    cache: Cache, i: Int[Array, ""], width: int
) -> tuple[Array, Array, Int[Array, " width"]]:
    """Keys and values [batch, kv_heads, width, head_dim] of chunk i, and their positions."""
    start = jnp.minimum(i * width, cache.capacity - width)
    positions = start + jnp.arange(width, dtype=jnp.int32)
    if not isinstance(cache, PagedCache):
        k, v = (jax.lax.dynamic_slice_in_dim(x, start, width, axis=2) for x in (cache.k, cache.v))
        return k, v, positions
    count = width // cache.page_size
    pages = jax.lax.dynamic_slice_in_dim(cache.page_table, start // cache.page_size, count, axis=1)

    def gather(pool):
        found = pool[pages].swapaxes(1, 2)
        return found.reshape(*found.shape[:2], width, found.shape[-1])

    return gather(cache.k_pages), gather(cache.v_pages), positions
