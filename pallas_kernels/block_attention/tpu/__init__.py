"""Block-diffusion attention for TPU, forward and backward, with work proportional to the mask.

The keys of a query are two intervals (`KeyIntervals`), so the kernels know no block size, no
document and no half: `schedule` turns intervals into windows of keys, `forward` and `backward` walk
over the windows. Keys and values of one row and kv head stay in VMEM while all tiles of queries
pass by. A row too long for that is cut into strips of keys, one kernel call each, that update
output and gradients in place.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.block_attention.constants import LOG2_E
from pallas_kernels.block_attention.residuals import named
from pallas_kernels.block_attention.tpu.backward import backward
from pallas_kernels.block_attention.tpu.forward import forward
from pallas_kernels.block_attention.tpu.launch import make_strip
from pallas_kernels.block_attention.tpu.memory import BACKWARD, FORWARD, Pass
from pallas_kernels.block_attention.tpu.schedule import Tiles, count_pairs, tile_bounds
from pallas_kernels.block_layout import KeyIntervals

__all__ = ["Tiles", "attend_tpu", "computed_pairs"]

DEFAULT_TILES = Tiles()


def attend_tpu(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    intervals: KeyIntervals,
    *,
    real: Bool[Array, "batch keys"] | None = None,
    tiles: Tiles = DEFAULT_TILES,
    interpret: bool = False,
) -> Float[Array, "batch queries heads head_dim"]:
    """Softmax attention of tokens to themselves, each query to the keys of its intervals.

    Scale head_dim**-0.5; fp32 scores, softmax and sums; matmuls in the inputs' dtype. A query
    without keys gives zeros and takes no gradient. Whatever the keys and values of padding hold
    reaches no output.

    Args:
      q, k, v: one dtype, bfloat16 or float32; heads is a multiple of kv_heads.
      intervals: of `key_intervals`; int32, may be traced.
      real: which keys are not padding, where the queries are some of the tokens only. By default
        there are as many queries as keys, and those without keys are padding.
      tiles: sizes to tune per chip.
      interpret: run on any device, for tests.

    Returns: the shape and dtype of q. Differentiable in q, k and v.
    Raises: ValueError for shapes or dtypes that do not go together, and when a tile's share of
      VMEM or the schedule's of scalar memory is too small.
    """
    real = intervals.count() > 0 if real is None else real
    _check(q, k, v, intervals, real)
    return _attend(q, k, v, intervals, real, tiles, interpret)


def computed_pairs(
    intervals: KeyIntervals,
    keys: int,
    tiles: Tiles = DEFAULT_TILES,
    *,
    group: int = 4,
    head_dim: int = 128,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> tuple[int, int]:
    """Query-key pairs in the kernels' schedules, (forward, backward), per query head.

    Summed over the batch, masked and padded pairs included; `intervals.pairs()` is the ideal.
    keys: length of the key axis. group (query heads a kv head), head_dim, dtype: decide, with the
    chip's VMEM, where a long row is cut into strips.
    """
    rows = tiles.queries * group
    forward_pairs, backward_pairs = (
        count_pairs(intervals, keys, of.strip_length(keys, rows, head_dim, dtype, tiles), tiles)
        for of in (FORWARD, BACKWARD)
    )
    return forward_pairs, backward_pairs


def _check(q, k, v, intervals: KeyIntervals, real) -> None:
    if intervals.own[0].shape != q.shape[:2]:
        raise ValueError(f"intervals of {intervals.own[0].shape} for queries {q.shape[:2]}")
    heads, kv_heads = q.shape[2], k.shape[2]
    same = (q.shape[0], *real.shape, q.shape[3]) == (k.shape[0], *k.shape[:2], k.shape[3])
    if k.shape != v.shape or not same:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape}: one batch, length and head_dim, and k like v"
            " (one length unless `real` is given, and then as many keys as it has)"
        )
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not divide into {kv_heads} kv heads")
    if {x.dtype for x in (q, k, v)} not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float32")}):
        raise ValueError(f"dtypes {q.dtype}, {k.dtype}, {v.dtype}: all bfloat16 or all float32")


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, intervals, real, tiles, interpret):
    return _attend_forward(q, k, v, intervals, real, tiles, interpret)[0]


def _attend_forward(q, k, v, intervals, real, tiles, interpret):
    kv_heads, head_dim = k.shape[2:]
    seen = intervals.count() > 0
    scale = head_dim**-0.5 * LOG2_E
    stacked = _stack((q.astype(jnp.float32) * scale).astype(q.dtype), seen, kv_heads, tiles)
    length, count = _strips(FORWARD, k.shape[1], stacked, tiles)
    k, v = (_resident(x, real, length * count) for x in (k, v))
    bounds = tile_bounds(intervals, tiles)

    def strip(index, carry):
        part = make_strip(index, length, count, bounds, tiles, interpret)
        return forward(part, stacked, k, v, carry)

    carry = strip(0, ())
    if count > 1:
        carry = lax.fori_loop(1, count, strip, carry)
    output, lse = carry
    output, lse = named(_unstack(output, q.shape).astype(q.dtype), lse)
    return output, (stacked, k, v, intervals, real, output, lse)


def _attend_backward(tiles, interpret, residuals, d_output):
    q, k, v, intervals, real, output, lse = residuals
    kv_heads = k.shape[1]
    length, count = _strips(BACKWARD, real.shape[1], q, tiles)
    seen = intervals.count() > 0
    k, v = (_fit(x, length * count) for x in (k, v))
    delta = (output.astype(jnp.float32) * d_output.astype(jnp.float32)).sum(-1, keepdims=True)
    delta = _stack(delta, seen, kv_heads, tiles).swapaxes(-1, -2)
    d_stacked = _stack(d_output.astype(q.dtype), seen, kv_heads, tiles)
    bounds = tile_bounds(intervals, tiles)

    def strip(index, carry):
        part = make_strip(index, length, count, bounds, tiles, interpret)
        d_q, d_k, d_v = backward(part, q, k, v, d_stacked, lse, delta, carry)
        return (d_q,), (d_k, d_v)

    carry, grads = strip(0, ())
    if count > 1:
        carry, more = lax.scan(lambda c, i: strip(i, c), carry, jnp.arange(1, count))
        grads = jax.tree.map(_join, grads, more)
    d_q = _unstack(carry[0], output.shape).astype(q.dtype)
    d_k, d_v = (x[:, :, : real.shape[1]].swapaxes(1, 2) for x in grads)
    return d_q, (d_k / LOG2_E).astype(k.dtype), d_v.astype(v.dtype), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _strips(of: Pass, keys: int, stacked, tiles: Tiles) -> tuple[int, int]:
    """Length and number of the strips of a row's keys, for the queries of `_stack`."""
    rows, head_dim = stacked.shape[3:]
    length = of.strip_length(keys, rows, head_dim, stacked.dtype, tiles)
    return length, -(-keys // length)


def _stack(x, seen, kv_heads: int, tiles: Tiles):
    """[batch, length, heads, n] -> [batch, kv_heads, tiles, group * tile_queries, n], the query
    heads of a kv head on top of each other, zeros where nothing is seen and at the end."""
    batch, length, heads, n = x.shape
    number = -(-length // tiles.queries)
    x = jnp.where(seen[:, :, None, None], x, jnp.zeros((), x.dtype))
    x = jnp.pad(x, ((0, 0), (0, number * tiles.queries - length), (0, 0), (0, 0)))
    x = x.reshape(batch, number, tiles.queries, kv_heads, heads // kv_heads, n)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(batch, kv_heads, number, -1, n)


def _unstack(x, shape):
    """The inverse of `_stack`, for q of this shape."""
    batch, length, heads, n = shape
    _, kv_heads, number, _, _ = x.shape
    x = x.reshape(batch, kv_heads, number, heads // kv_heads, -1, n)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, heads, n)[:, :length]


def _resident(x, real, keys: int):
    """[batch, length, kv_heads, n] -> [batch, kv_heads, keys, n], zeros in padding: a key that no
    query sees may hold NaN, and 0 * NaN would reach the sums."""
    x = jnp.where(real[:, :, None, None], x, jnp.zeros((), x.dtype))
    return _fit(x.swapaxes(1, 2), keys)


def _fit(x, keys: int):
    """Cuts or pads the axis of keys."""
    x = x[:, :, :keys]
    return jnp.pad(x, ((0, 0), (0, 0), (0, keys - x.shape[2]), (0, 0)))


def _join(first, more):
    """[...] of the first strip and [strips, ...] of the others -> one axis of keys."""
    return jnp.concatenate([first, *more], axis=2)
