"""Decode attention for GPU (Pallas, Triton): any recent NVIDIA or AMD GPU.

A few rows of queries do not fill a GPU, so that the cache of a row is cut into splits that run
side by side and are merged by their log-sum-exp ("flash decoding"). A split's share follows from
the row's length: all of them work, and none beyond the length. Keys are gathered by position,
through the page table where there is one; the own keys are the first split's.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float

from pallas_kernels.block_attention.decode.cache import Cache, PagedCache
from pallas_kernels.block_attention.decode.online_softmax import (
    Partial,
    attend,
    merge,
    no_keys,
    output,
)

_ROWS, _KEYS = 64, 64  # queries a program, keys a step
_PROGRAMS = 256  # what keeps a large GPU busy: about two a multiprocessor
_SMALLEST = 16  # side of the smallest matmul


def decode_gpu(
    q: Float[Array, "batch kv_heads rows head_dim"],
    k: Float[Array, "batch kv_heads own head_dim"],
    v: Float[Array, "batch kv_heads own head_dim"],
    mask: Bool[Array, "batch own own"],
    cache: Cache,
    *,
    interpret: bool = False,
) -> Float[Array, "batch kv_heads rows head_dim"]:
    """As `api.decode_attention`, of queries that are scaled and stacked as `api` does it.

    Raises: ValueError for a head_dim that is no power of two of at least 16.
    """
    batch, kv_heads, rows, head_dim = q.shape
    if head_dim < _SMALLEST or head_dim & (head_dim - 1):
        raise ValueError(
            f"head_dim={head_dim}: the gpu backend needs a power of two from {_SMALLEST} on; "
            "choose backend 'xla'"
        )
    tile = min(_ROWS, max(pl.next_power_of_2(rows), _SMALLEST))
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -rows % tile), (0, 0)))
    tiles = q.shape[2] // tile
    steps = pl.cdiv(cache.capacity, _KEYS)
    splits = max(min(_PROGRAMS // (batch * kv_heads * tiles), steps), 1)
    paged = isinstance(cache, PagedCache)
    pool = (cache.k_pages, cache.v_pages) if paged else (cache.k, cache.v)
    table = (cache.page_table,) if paged else ()

    def matrix(x):
        return x.reshape(-1, head_dim)

    whole = pl.BlockSpec()
    query_spec = pl.BlockSpec((None, None, tile, head_dim), lambda s, r, h, b: (b, h, r, 0))

    def partial_spec(width):
        return pl.BlockSpec((None, None, None, tile, width), lambda s, r, h, b: (s, b, h, r, 0))

    widths = (1, 1, head_dim)
    state = pl.pallas_call(
        functools.partial(_kernel, pool_shape=pool[0].shape),
        out_shape=[
            jax.ShapeDtypeStruct((splits, *q.shape[:3], width), jnp.float32) for width in widths
        ],
        grid=(splits, tiles, kv_heads, batch),
        in_specs=[query_spec] + [whole] * (6 + len(table)),
        out_specs=[partial_spec(width) for width in widths],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )(
        q,
        matrix(k),
        matrix(v),
        mask.astype(jnp.int32),
        matrix(pool[0]),
        matrix(pool[1]),
        cache.lengths,
        *table,
    )
    return output(merge(Partial(*state)))[:, :, :rows]


def _kernel(q_ref, k_ref, v_ref, mask_ref, cache_k, cache_v, lengths, *refs, pool_shape):
    """One split of the keys for one tile of queries; writes what `merge` needs."""
    *table, peak_ref, total_ref, weighted_ref = refs
    split, tile, head, row = (pl.program_id(axis) for axis in range(4))
    kv_heads, per_source = pool_shape[1:3]  # positions of a row, or of a page
    queries = mask_ref.shape[1]
    q, length = q_ref[...], lengths[row]
    query = (tile * q.shape[0] + jnp.arange(q.shape[0], dtype=jnp.int32)) % queries

    def load(ref, rows, inside):
        columns = jnp.arange(q.shape[1], dtype=jnp.int32)
        shape = (rows.shape[0], columns.shape[0])
        mask = jnp.broadcast_to(inside[:, None], shape)
        return plgpu.load(ref.at[rows[:, None], columns[None]], mask=mask, other=0)

    def own_keys(i, state):
        position = i * _KEYS + jnp.arange(_KEYS, dtype=jnp.int32)
        inside = position < queries
        at = (row * kv_heads + head) * queries + position
        seen = plgpu.load(
            mask_ref.at[row, query[:, None], position[None]],
            mask=jnp.broadcast_to(inside[None], (q.shape[0], _KEYS)),
            other=0,
        )
        return attend(state, q, load(k_ref, at, inside), load(v_ref, at, inside), seen != 0)

    def cached_keys(i, state):
        position = i * _KEYS + jnp.arange(_KEYS, dtype=jnp.int32)
        inside = position < length
        source, within = row, position
        if table:
            page = plgpu.load(table[0].at[row, position // per_source], mask=inside, other=0)
            source, within = page, position % per_source
        at = (source * kv_heads + head) * per_source + within
        keys, values = load(cache_k, at, inside), load(cache_v, at, inside)
        return attend(state, q, keys, values, inside[None])

    # A product: Triton's lowering takes the literals of a scalar `where` for booleans.
    own_steps = pl.cdiv(queries, _KEYS) * (split == 0).astype(jnp.int32)
    state = jax.lax.fori_loop(0, own_steps, own_keys, no_keys(q.shape))
    steps = pl.cdiv(length, _KEYS)
    share = pl.cdiv(steps, pl.num_programs(0))
    first = split * share
    last = jnp.minimum(first + share, steps)
    state = jax.lax.fori_loop(first, last, cached_keys, state)
    for ref, value in zip((peak_ref, total_ref, weighted_ref), state, strict=True):
        ref[...] = value
