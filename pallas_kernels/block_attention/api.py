"""The typed entry to attention under a BlockLayout."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_attention.reference import attend_reference
from pallas_kernels.block_attention.xla import attend_xla
from pallas_kernels.block_layout import BlockLayout, concatenate

BACKENDS = ("xla", "reference")

KeyValues = tuple[Array, Array, BlockLayout]
"""Keys and values [batch, keys, kv_heads, head_dim] and where they stand."""


def block_attention(
    q: Float[Array, "batch queries heads head_dim"],
    parts: Sequence[KeyValues],
    queries: BlockLayout,
    *,
    backend: str = "xla",
) -> Float[Array, "batch queries heads head_dim"]:
    """Attention of block queries over one or more parts of keys (own keys, KV cache).

    Args:
      q: [batch, queries, heads, head_dim]; heads is a multiple of kv_heads (grouped queries).
      parts: keys, values and layout of each part.
      queries: layout of the queries.
      backend: one of BACKENDS.

    Returns: the shape and dtype of q; zeros where a query has no key.
    Raises: ValueError for an unknown backend.
    """
    if backend == "xla":
        return attend_xla(q, parts, queries)
    if backend == "reference":
        k = jnp.concatenate([p[0] for p in parts], axis=1)
        v = jnp.concatenate([p[1] for p in parts], axis=1)
        return attend_reference(q, k, v, queries, concatenate([p[2] for p in parts]))
    raise ValueError(f"attention backend {backend!r}: choose one of {BACKENDS}")
