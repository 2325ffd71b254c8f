"""Softmax attention over keys that arrive in pieces; the arithmetic that all backends share."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.block_attention.constants import MASKED

_FLOOR = 0.5 * MASKED  # above every masked score: before the first key, exp2(masked - peak) is 0


class Partial(NamedTuple):
    """What is known after some of the keys, all fp32.

    peak: the largest score so far, in powers of two. total: the sum of weights relative to it.
    weighted: the sum of weighted values.
    """

    peak: Float[Array, "... queries 1"]
    total: Float[Array, "... queries 1"]
    weighted: Float[Array, "... queries head_dim"]


def no_keys(shape: tuple[int, ...]) -> Partial:
    """The state before the first key, for queries of shape [..., queries, head_dim]."""
    column = (*shape[:-1], 1)
    return Partial(
        jnp.full(column, _FLOOR, jnp.float32),
        jnp.zeros(column, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )


def attend(
    state: Partial,
    q: Float[Array, "... queries head_dim"],
    k: Float[Array, "... keys head_dim"],
    v: Float[Array, "... keys head_dim"],
    seen: Bool[Array, "... #queries keys"],
) -> Partial:
    """Takes more keys into account.

    Args:
      q: scaled by log2(e), so that scores are exponents of two.
      k: may be anything where it is not seen. v: finite, also where it is not seen.
    """
    score = _matmul(q, k.astype(q.dtype), contract=-1)
    score = jnp.where(seen, score, MASKED)
    peak = jnp.maximum(state.peak, jnp.max(score, axis=-1, keepdims=True))
    weight = jnp.exp2(score - peak)
    kept = jnp.exp2(state.peak - peak)
    return Partial(
        peak,
        kept * state.total + jnp.sum(weight, axis=-1, keepdims=True),
        kept * state.weighted + _matmul(weight.astype(q.dtype), v.astype(q.dtype), contract=-2),
    )


def merge(parts: Partial) -> Partial:
    """One state from those of disjoint keys, stacked along a new first axis."""
    peak = parts.peak.max(0)
    share = jnp.exp2(parts.peak - peak)
    return Partial(peak, (share * parts.total).sum(0), (share * parts.weighted).sum(0))


def output(state: Partial) -> Float[Array, "... queries head_dim"]:
    """The attention output, fp32; zeros where no key was seen."""
    return state.weighted / jnp.where(state.total > 0, state.total, 1.0)


def _matmul(a, b, *, contract: int):
    """a's last axis with b's `contract` axis, fp32 sums; leading axes are batch axes."""
    batch = tuple(range(a.ndim - 2))
    # fp32 models are for parity; everywhere else the accelerators' fast path is the default one.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((a.ndim - 1,), (b.ndim + contract,)), (batch, batch)),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
