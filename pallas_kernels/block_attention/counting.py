"""Inverting sorted bounds, in O(length): no sort, no search, nothing of one size times another."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


def count_at_most(values: Int[Array, "*rows n"], size: int) -> Int[Array, "*rows size"]:
    """How many of a row's values are at most 0, 1, … size - 1, int32; the values are not negative.

    For sorted values that is where `searchsorted(values, i, side="right")` would put i.
    """
    rows = values.reshape(-1, values.shape[-1])
    # What is larger than asked for is dropped.
    index = jnp.broadcast_to(jnp.arange(rows.shape[0])[:, None], rows.shape)
    histogram = jnp.zeros((rows.shape[0], size), jnp.int32).at[index, rows].add(1, mode="drop")
    return lax.cumsum(histogram, axis=1).reshape(*values.shape[:-1], size)
