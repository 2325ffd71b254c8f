"""The three kernels in Pallas Triton: forward, gradient of q, gradients of k and v.

A tile is a rectangle of (query position, head of one group) pairs stacked as rows, against keys of
the head that the group shares: with 4 or 8 heads a group, 16 or 32 positions already fill the
tensor cores, which keeps tiles on the block diagonal and on document edges small.

Rows are gathered by index from the arrays as they are, [batch, length, heads, head_dim], so that
nothing is transposed in memory. No kernel accumulates across programs: results do not change from
run to run.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.block_attention.constants import LOG2_E, MASKED
from pallas_kernels.block_attention.gpu import schedule
from pallas_kernels.block_attention.gpu.schedule import Tiles


def unsupported(q, k, tiles: Tiles) -> str | None:
    """Why arrays like q and k cannot be run, or not with these tiles, or None."""
    head_dim = q.shape[3]
    if head_dim & (head_dim - 1) or head_dim < 16:
        return f"head_dim {head_dim} is not a power of two of at least 16; pad it, or use 'xla'"
    if any(n & (n - 1) for tile in dataclasses.astuple(tiles) for n in tile):
        return f"{tiles}: sizes are not powers of two"
    return None


def default_tiles(q, k) -> Tiles:
    """128 rows forward and 64 backward, against 64 keys; half of it for rows of over 256 bytes.

    The largest that need neither spilled registers nor more shared memory than an SM has on any
    GPU since Ampere (99 KiB), at head_dim 128 in bf16.
    """
    stack = stacked(q.shape[2], k.shape[2])
    narrow = 1 if q.shape[3] * q.dtype.itemsize <= 256 else 2

    def tile(rows):
        return max(1, rows // narrow // stack), 64 // narrow

    return Tiles(forward=tile(128), query_gradient=tile(64), key_gradients=tile(64))


def stacked(heads: int, kv_heads: int) -> int:
    """Heads of a group that share a tile: a power of two, which Triton's shapes have to be."""
    group = heads // kv_heads
    return group & -group


def forward(q, k, v, starts, ends, ranges, *, tile, interpret):
    """Output like q, and log2 of the softmax denominators, fp32 [batch, heads, queries]."""
    batch, queries, heads, _ = q.shape
    lse = jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)
    call = functools.partial(_over_queries, _forward_kernel, warps=8, interpret=interpret)
    return call([_like(q), lse], ranges, k, v, starts, ends, q, tile=tile)


def query_gradient(q, k, v, do, lse, delta, starts, ends, ranges, *, tile, interpret):
    """dq, like q. `delta` is the row sum of do · o, fp32 [batch, heads, queries]."""
    call = functools.partial(_over_queries, _query_gradient_kernel, warps=4, interpret=interpret)
    return call([_like(q)], ranges, k, v, starts, ends, q, do, lse, delta, tile=tile)[0]


def key_gradients(q, k, v, do, lse, delta, starts, ends, ranges, *, tile, interpret):
    """dk and dv, like k and v. `ranges` are those of query tiles for each key tile."""
    batch, keys, kv_heads, head_dim = k.shape
    positions, key_tile = tile
    group = q.shape[2] // kv_heads
    stack = stacked(q.shape[2], kv_heads)
    own = pl.BlockSpec((None, key_tile, None, head_dim), lambda i, head, b: (b, i, head, 0))
    bounds = pl.BlockSpec((None, *starts.shape[1:]), lambda i, head, b: (b, 0, 0))
    queries = pl.BlockSpec((None, q.shape[1], group, head_dim), lambda i, head, b: (b, 0, head, 0))
    sums = pl.BlockSpec((None, group, q.shape[1]), lambda i, head, b: (b, head, 0))
    return pl.pallas_call(
        functools.partial(_key_gradients_kernel, positions=positions, stack=stack),
        grid=(keys // key_tile, kv_heads, batch),
        in_specs=[
            pl.BlockSpec((None, None, *ranges.shape[2:]), lambda i, head, b: (b, i, 0, 0)),
            *(own, own, bounds, bounds, queries, queries, sums, sums),
        ],
        out_specs=[own, own],
        out_shape=[_like(k), _like(v)],
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="block_attention_key_gradients",
    )(ranges, k, v, starts, ends, q, do, lse, delta)


def _over_queries(kernel, outputs, ranges, k, v, starts, ends, *rows, tile, warps, interpret):
    """Runs a program for each query tile and stack of heads, with the keys of their kv head."""
    batch, queries, heads, head_dim = rows[0].shape
    keys, kv_heads = k.shape[1:3]
    positions, key_tile = tile
    stack = stacked(heads, kv_heads)
    chunks = heads // kv_heads // stack
    last = queries // positions - 1  # has the most keys of its half: long programs start first

    def spec(x):
        if len(x.shape) == 3:
            return pl.BlockSpec((None, stack, positions), lambda i, c, b: (b, c, last - i))
        block = None, positions, stack, head_dim
        return pl.BlockSpec(block, lambda i, c, b: (b, last - i, c, 0))

    bounds = pl.BlockSpec((None, schedule.RUNS, positions), lambda i, c, b: (b, 0, last - i))
    per_head = pl.BlockSpec((None, keys, None, head_dim), lambda i, c, b: (b, 0, c // chunks, 0))
    return pl.pallas_call(
        functools.partial(kernel, positions=positions, stack=stack, key_tile=key_tile),
        grid=(last + 1, heads // stack, batch),
        in_specs=[
            pl.BlockSpec((None, None, *ranges.shape[2:]), lambda i, c, b: (b, last - i, 0, 0)),
            *(per_head, per_head, bounds, bounds),
            *map(spec, rows),
        ],
        out_specs=[*map(spec, outputs)],
        out_shape=outputs,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
        name=f"block_attention{kernel.__name__.removesuffix('_kernel')}",
    )(ranges, k, v, starts, ends, *rows)


def _forward_kernel(
    ranges_ref, k_ref, v_ref, starts_ref, ends_ref, q_ref, o_ref, lse_ref,
    *, positions, stack, key_tile,
):  # fmt: skip
    position, head = _rows(positions, stack)
    q = q_ref[position, head, :]
    scale = q.shape[1] ** -0.5 * LOG2_E

    def visit(run, tile, masked, carry):
        total, top, out = carry
        keys = pl.ds(tile * key_tile, key_tile)
        score = _dot(q, k_ref[keys, :].T) * scale
        if masked:
            score = jnp.where(_inside(starts_ref, ends_ref, run, position, keys), score, -jnp.inf)
        new_top = jnp.maximum(top, score.max(axis=1))
        weight = jnp.exp2(score - new_top[:, None])
        decay = jnp.exp2(top - new_top)
        v = v_ref[keys, :]
        out = out * decay[:, None] + _dot(weight.astype(v.dtype), v)
        return total * decay + weight.sum(axis=1), new_top, out

    rows = (q.shape[0],)
    carry = jnp.zeros(rows), jnp.full(rows, MASKED), jnp.zeros(q.shape, jnp.float32)
    total, top, out = _sweep(ranges_ref, visit, carry)
    total = jnp.where(total > 0, total, 1.0)  # a row without keys
    o_ref[position, head, :] = (out / total[:, None]).astype(o_ref.dtype)
    lse_ref[head, position] = top + jnp.log2(total)


def _query_gradient_kernel(
    ranges_ref, k_ref, v_ref, starts_ref, ends_ref, q_ref, do_ref, lse_ref, delta_ref, dq_ref,
    *, positions, stack, key_tile,
):  # fmt: skip
    position, head = _rows(positions, stack)
    q, do = q_ref[position, head, :], do_ref[position, head, :]
    lse, delta = lse_ref[head, position], delta_ref[head, position]
    scale = q.shape[1] ** -0.5

    def visit(run, tile, masked, dq):
        keys = pl.ds(tile * key_tile, key_tile)
        k = k_ref[keys, :]
        weight = jnp.exp2(_dot(q, k.T) * (scale * LOG2_E) - lse[:, None])
        if masked:
            weight = jnp.where(_inside(starts_ref, ends_ref, run, position, keys), weight, 0.0)
        d_score = weight * (_dot(do, v_ref[keys, :].T) - delta[:, None])
        return dq + _dot(d_score.astype(k.dtype), k)

    dq = _sweep(ranges_ref, visit, jnp.zeros(q.shape, jnp.float32))
    dq_ref[position, head, :] = (dq * scale).astype(dq_ref.dtype)


def _key_gradients_kernel(
    ranges_ref, k_ref, v_ref, starts_ref, ends_ref, q_ref, do_ref, lse_ref, delta_ref, dk_ref,
    dv_ref, *, positions, stack,
):  # fmt: skip
    k, v = k_ref[...], v_ref[...]
    scale = k.shape[1] ** -0.5
    keys = pl.ds(pl.program_id(0) * k.shape[0], k.shape[0])
    in_tile, in_stack = _rows(positions, stack)

    def visit(run, tile, masked, carry, first_head):
        dk, dv = carry
        position, head = tile * positions + in_tile, first_head + in_stack
        q, do = q_ref[position, head, :], do_ref[position, head, :]
        lse, delta = lse_ref[head, position], delta_ref[head, position]
        weight = jnp.exp2(_dot(k, q.T) * (scale * LOG2_E) - lse[None])  # [keys, rows]
        if masked:
            inside = _inside(starts_ref, ends_ref, run, position, keys, rows_first=False)
            weight = jnp.where(inside, weight, 0.0)
        dv = dv + _dot(weight.astype(do.dtype), do)
        d_score = weight * (_dot(v, do.T) - delta[None])
        return dk + _dot(d_score.astype(q.dtype), q), dv

    carry = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for first_head in range(0, q_ref.shape[1], stack):
        carry = _sweep(ranges_ref, functools.partial(visit, first_head=first_head), carry)
    dk, dv = carry
    dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _rows(positions, stack):
    """Query position and head of each row of a tile, int32 [positions * stack]."""
    row = jnp.arange(positions * stack, dtype=jnp.int32)
    return lax.div(row, stack), lax.rem(row, stack)


def _sweep(ranges_ref, visit, carry):
    """Runs visit(run, tile, masked, carry) over the tiles without a mask, then those with one."""
    runs, bounds = ranges_ref.shape
    table = [[ranges_ref[run, bound] for bound in range(bounds)] for run in range(runs)]

    def loop(tiles, masked, carry):
        def step(i, carry):
            return visit(*schedule.walk(tiles, i), masked, carry)

        return lax.fori_loop(0, schedule.steps(tiles), step, carry)

    carry = loop(schedule.whole_tiles(table), False, carry)
    return loop(schedule.masked_tiles(table), True, carry)


def _inside(starts_ref, ends_ref, run, position, keys, rows_first=True):
    """Which keys of a tile the run of each row holds."""
    start, end = starts_ref[run, position], ends_ref[run, position]
    key = keys.start + jnp.arange(keys.size, dtype=jnp.int32)
    if rows_first:
        return (key[None] >= start[:, None]) & (key[None] < end[:, None])
    return (key[:, None] >= start[None]) & (key[:, None] < end[None])


def _dot(a, b):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
