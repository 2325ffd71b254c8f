"""Decode attention for TPU (Pallas, Mosaic).

The grid is (kv head, step of the schedule). The schedule lists, row after row, the chunks of the
cache that the row's length covers; it is data, and so is the number of its steps, so that neither
arithmetic nor copies depend on the cache's capacity. The queries of a kv head's group are stacked
into one matrix. The row's first step starts with the own keys.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.block_attention.decode.cache import Cache, PagedCache
from pallas_kernels.block_attention.decode.online_softmax import Partial, attend, no_keys, output
from pallas_kernels.block_attention.tpu.memory import LANES, check_scalars

_SCORES = 2**18  # scores a step, at most: one MiB of fp32
_CHUNK = 1024  # keys a step, at most: longer copies would not be faster
_SUBLANES = 16  # rows of a packed 16-bit tile


def decode_tpu(
    q: Float[Array, "batch kv_heads rows head_dim"],
    k: Float[Array, "batch kv_heads own head_dim"],
    v: Float[Array, "batch kv_heads own head_dim"],
    mask: Bool[Array, "batch own own"],
    cache: Cache,
    *,
    interpret: bool = False,
) -> Float[Array, "batch kv_heads rows head_dim"]:
    """As `api.decode_attention`, of queries that are scaled and stacked as `api` does it.

    Raises: ValueError where the schedule does not fit scalar memory.
    """
    batch, kv_heads, rows, head_dim = q.shape
    queries = mask.shape[1]
    group = rows // queries
    q, mask = _pad_queries(q, mask)
    rows = q.shape[2]
    pool = (cache.k_pages, cache.v_pages) if isinstance(cache, PagedCache) else (cache.k, cache.v)
    part, parts = _chunk_shape(cache, rows)
    plan = _schedule(cache, part, parts)
    check_scalars(
        f"the schedule of {batch} rows over a cache of {cache.capacity} in copies of {part}",
        (plan.row, plan.chunk, plan.left, plan.source),
        "fewer rows a device, a smaller cache, or larger pages",
    )

    def of_row(head, step, row, *_):
        return row[step], head, 0, 0

    def of_chunk(i, head, step, row, chunk, left, source):
        within = 0 if isinstance(cache, PagedCache) else chunk[step]
        return source[step * parts + i], head, within, 0

    query_spec = pl.BlockSpec((None, None, rows, head_dim), of_row)
    own_spec = pl.BlockSpec((None, None, queries, head_dim), of_row)
    mask_spec = pl.BlockSpec((None, *mask.shape[1:]), lambda head, step, row, *_: (row[step], 0, 0))
    cache_specs = [
        pl.BlockSpec((None, None, part, head_dim), functools.partial(of_chunk, i))
        for i in range(parts)
    ]
    out = pl.pallas_call(
        functools.partial(_kernel, parts=parts),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(kv_heads, plan.steps),
            in_specs=[query_spec, own_spec, own_spec, mask_spec, *cache_specs, *cache_specs],
            out_specs=query_spec,
            scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32) for width in (1, 1, head_dim)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="decode_attention",
    )(
        plan.row,
        plan.chunk,
        plan.left,
        plan.source,
        q,
        k,
        v,
        mask.astype(jnp.int32),
        *[pool[0]] * parts,
        *[pool[1]] * parts,
    )
    out = out.reshape(batch, kv_heads, group, -1, head_dim)[:, :, :, :queries]
    return out.reshape(batch, kv_heads, -1, head_dim)


def _kernel(row, chunk, left, source, q_ref, k_ref, v_ref, mask_ref, *refs, parts: int):
    """One chunk of one row and head. The cache's chunk comes in `parts` pieces (pages)."""
    del row, source  # for the index maps
    k_parts, v_parts, (out_ref, *state) = refs[:parts], refs[parts : 2 * parts], refs[2 * parts :]
    step = pl.program_id(1)
    q = q_ref[...]

    def update(previous: Partial, keys, values, seen):
        for ref, value in zip(state, attend(previous, q, keys, values, seen), strict=True):
            ref[...] = value

    @pl.when(chunk[step] == 0)
    def _():
        queries, own = mask_ref.shape
        group = q.shape[0] // queries
        mask = jnp.broadcast_to(mask_ref[...][None], (group, queries, own))
        update(no_keys(q.shape), k_ref[...], v_ref[...], mask.reshape(-1, own) != 0)

    keys, values = _joined(k_parts), _joined(v_parts)
    width = keys.shape[0]

    @pl.when(left[step] > 0)
    def _():
        key = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
        value = jax.lax.broadcasted_iota(jnp.int32, (width, 1), 0)
        inside = jnp.where(value < left[step], values, jnp.zeros((), values.dtype))
        update(Partial(*(ref[...] for ref in state)), keys, inside, key < left[step])

    @pl.when(left[step] <= width)
    def _():
        out_ref[...] = output(Partial(*(ref[...] for ref in state))).astype(out_ref.dtype)


def _joined(refs):
    pieces = [ref[...] for ref in refs]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=0)


def _pad_queries(q, mask):
    """Rounds the queries of every head up to whole tiles; the padding sees nothing."""
    batch, kv_heads, rows, head_dim = q.shape
    queries = mask.shape[1]
    extra = -queries % _SUBLANES
    if not extra:
        return q, mask
    q = q.reshape(batch, kv_heads, -1, queries, head_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, extra), (0, 0)))
    mask = jnp.pad(mask, ((0, 0), (0, extra), (0, 0)))
    return q.reshape(batch, kv_heads, -1, head_dim), mask


def _chunk_shape(cache: Cache, rows: int) -> tuple[int, int]:
    """Positions of a copy, and copies a step: a step's scores stay within _SCORES. A copy of a part
    of a cache is whole tiles."""
    target = max(min(_SCORES // rows, _CHUNK) // LANES, 1) * LANES
    if isinstance(cache, PagedCache):
        return cache.page_size, max(min(target, cache.capacity) // cache.page_size, 1)
    return min(target, cache.capacity), 1


class _Schedule(NamedTuple):
    """Which chunk of which row every step works on; the first `steps` entries count.

    row, chunk: int32. left: int32, positions from the chunk's start to the row's length. source:
    int32, the place of each of a step's parts on the pool's first axis: its row or its page.
    """

    row: Int[Array, " most"]
    chunk: Int[Array, " most"]
    left: Int[Array, " most"]
    source: Int[Array, " most*parts"]
    steps: Int[Array, ""]


def _schedule(cache: Cache, part: int, parts: int) -> _Schedule:
    """Every row has at least one step, for its own keys."""
    width, batch = part * parts, cache.lengths.shape[0]
    most = -(-cache.capacity // width)
    chunks = jnp.maximum(-(-cache.lengths // width), 1)
    ends = jnp.cumsum(chunks)
    step = jnp.arange(batch * most, dtype=jnp.int32)
    row = jnp.minimum((step[:, None] >= ends).sum(-1, dtype=jnp.int32), batch - 1)
    chunk = step - (ends - chunks)[row]
    left = cache.lengths[row] - chunk * width
    source = row
    if isinstance(cache, PagedCache):
        table = jnp.pad(cache.page_table, ((0, 0), (0, -cache.page_table.shape[1] % parts)))
        table = table.reshape(batch, most, parts)
        source = table[row, jnp.minimum(chunk, most - 1)].reshape(-1)
    return _Schedule(row, chunk, left, source, ends[-1])
