"""The oracle of decode attention: dense, fp32, one softmax. For tests and toy sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.block_attention.decode.cache import Cache, PagedCache


def decode_reference(
    q: Float[Array, "batch kv_heads rows head_dim"],
    k: Float[Array, "batch kv_heads own head_dim"],
    v: Float[Array, "batch kv_heads own head_dim"],
    mask: Bool[Array, "batch own own"],
    cache: Cache,
) -> Float[Array, "batch kv_heads rows head_dim"]:
    """As `api.decode_attention`, of queries that are scaled and stacked as `api` does it."""
    cached_k, cached_v = _contiguous(cache)
    count = q.shape[2] // mask.shape[1]
    own = jnp.tile(mask, (1, count, 1))[:, None]
    inside = jnp.arange(cached_k.shape[2]) < cache.lengths[:, None]
    inside = jnp.broadcast_to(inside[:, None, None], (*own.shape[:-1], inside.shape[-1]))
    seen = jnp.concatenate([inside, own], axis=-1)
    keys, values = (
        jnp.concatenate([x.astype(jnp.float32) for x in pair], axis=2)
        for pair in ((cached_k, k), (cached_v, v))
    )
    score = jnp.einsum("bkrh,bksh->bkrs", q.astype(jnp.float32), keys)
    weights = jnp.where(seen, jax.nn.softmax(score * jnp.log(2.0), axis=-1, where=seen), 0.0)
    # 0 * NaN would let what lies beyond a length into the sum.
    values = jnp.where(seen.any(-2)[..., None], values, 0.0)
    return jnp.einsum("bkrs,bksh->bkrh", weights, values)


def _contiguous(cache: Cache) -> tuple[Array, Array]:
    if not isinstance(cache, PagedCache):
        return cache.k, cache.v

    def gather(pages):
        return jnp.concatenate(
            [pages[cache.page_table[:, i]] for i in range(cache.page_table.shape[1])], axis=2
        )

    return gather(cache.k_pages), gather(cache.v_pages)
