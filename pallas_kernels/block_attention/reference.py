"""The oracle: dense, fp32, one softmax over the whole mask. For tests and toy sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_layout import BlockLayout, allowed


def attend_reference(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    queries: BlockLayout,
    keys: BlockLayout,
) -> Float[Array, "batch queries heads head_dim"]:
    """Softmax attention in fp32 with scale head_dim**-0.5; a query without keys gives zeros."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x.astype(jnp.float32), repeats, axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q.astype(jnp.float32), k) * q.shape[-1] ** -0.5
    mask = allowed(queries, keys)[:, None]
    weights = jax.nn.softmax(scores, axis=-1, where=mask)
    weights = jnp.where(mask, weights, 0.0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).astype(q.dtype)
