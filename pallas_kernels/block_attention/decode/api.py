"""The typed entry to decode attention.

A decoding forward has a few queries a row (the block under way, or a finished block beside the
next one) and many keys: the cache of the row's committed blocks, of which every query sees every
key, and the queries' own keys, under the attention rule. Both are taken into one softmax, in one
pass over the cache that ends where the row's sequence ends.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_attention.api import TOY_KEYS
from pallas_kernels.block_attention.constants import LOG2_E
from pallas_kernels.block_attention.decode.cache import Cache, ContiguousCache, PagedCache
from pallas_kernels.block_attention.decode.reference import decode_reference
from pallas_kernels.block_attention.decode.selection import KERNELS, select
from pallas_kernels.block_attention.decode.xla import decode_xla
from pallas_kernels.block_layout import PADDING, BlockLayout, allowed

# Pallas takes seconds to import, so each kernel is imported when it is used.


def _decode_tpu(*arguments, interpret: bool):
    from pallas_kernels.block_attention.decode.tpu import decode_tpu

    return decode_tpu(*arguments, interpret=interpret)


def _decode_gpu(*arguments, interpret: bool):
    from pallas_kernels.block_attention.decode.gpu import decode_gpu

    return decode_gpu(*arguments, interpret=interpret)


_BACKENDS = {
    "tpu": _decode_tpu,
    "gpu": _decode_gpu,
    "xla": decode_xla,
    "reference": decode_reference,
}
DECODE_BACKENDS = ("auto", *_BACKENDS)


def decode_backend(name: str) -> str:
    """The decode backend for a model's `attention_backend`: "auto" for those that have none
    ("splash", "mosaic", "triton"), the others are themselves."""
    return name if name in DECODE_BACKENDS else "auto"


def decode_attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch queries kv_heads head_dim"],
    v: Float[Array, "batch queries kv_heads head_dim"],
    own: BlockLayout,
    cache: Cache,
    *,
    backend: str = "auto",
    interpret: bool = False,
) -> Float[Array, "batch queries heads head_dim"]:
    """Attention of the blocks under way over a KV cache and themselves (§5.4). Forward only.

    Every query that is not padding sees positions [0, length) of its row's cache, and of its own
    keys those that `allowed(own, own)` lets it see: two blocks can ride in one forward, a clean
    one to commit and the noisy one after it. Scores and sums are fp32, the matmuls in q's dtype.
    Nothing beyond a row's length, and no padding key, reaches the output, not even as NaN.

    Args:
      q, k, v: of the tokens under way, up to a few hundred a row; heads is a multiple of kv_heads.
      own: where those tokens stand.
      cache: what the row has committed; of any float dtype.
      backend: one of DECODE_BACKENDS. "auto": the platform's kernel if it proves itself on the
        device at hand (see `selection.select`), else "xla". "reference" is the dense oracle.
      interpret: run the kernels of "tpu" and "gpu" in Pallas's interpreter (tests).

    Returns: the shape and dtype of q; zeros where a query has no key.
    Raises: ValueError for an unknown backend, for heads and shapes that do not fit, and for
      "reference" beyond a cache of TOY_KEYS.
    """
    if backend not in DECODE_BACKENDS:
        raise ValueError(f"decode backend {backend!r}: choose one of {DECODE_BACKENDS}")
    _check(q, k, cache)
    if backend == "auto":
        backend = select(decode_attention, q, k, v, own, cache)
    if backend == "reference" and cache.capacity > TOY_KEYS:
        raise ValueError(
            f"decode backend 'reference' holds all scores at once: a cache of {cache.capacity}, at "
            f"most {TOY_KEYS}. Choose 'auto'"
        )
    mask = allowed(own, own)
    real = own.segment != PADDING
    k, v = (jnp.where(real[..., None, None], x, jnp.zeros((), x.dtype)) for x in (k, v))
    cache = _only_what_is_read(cache, real.any(-1))
    options = {"interpret": interpret} if backend in KERNELS else {}
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    out = _BACKENDS[backend](_stack(q, k.shape[2]), keys, values, mask, cache, **options)
    out = _unstack(out.astype(q.dtype), q.shape)
    return jnp.where(real[..., None, None], out, jnp.zeros((), q.dtype))


def _check(q, k, cache: Cache) -> None:
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} heads over {kv_heads} kv_heads: heads must be a multiple")
    pool = cache.k_pages if isinstance(cache, PagedCache) else cache.k
    if (pool.shape[1], pool.shape[3]) != (kv_heads, k.shape[3]):
        raise ValueError(
            f"cache of shape {pool.shape}: axes 1 and 3 must be kv_heads={kv_heads} and "
            f"head_dim={k.shape[3]} (caches are head-major)"
        )


def _only_what_is_read(cache: Cache, active: Array) -> Cache:
    """Rows without a query read nothing; page table entries that no position needs are page 0."""
    lengths = jnp.where(active, cache.lengths, 0)
    if isinstance(cache, ContiguousCache):
        return ContiguousCache(cache.k, cache.v, lengths)
    first = jnp.arange(cache.page_table.shape[1], dtype=jnp.int32) * cache.page_size
    table = jnp.where(first < lengths[:, None], cache.page_table, 0)
    return PagedCache(cache.k_pages, cache.v_pages, table, lengths)


def _stack(q, kv_heads: int):
    """[batch, queries, heads, head_dim] -> [batch, kv_heads, heads of the group * queries, ...],
    scaled, so that a group's queries are the rows of one matrix."""
    batch, queries, heads, head_dim = q.shape
    q = (q.astype(jnp.float32) * (LOG2_E * head_dim**-0.5)).astype(q.dtype)
    q = q.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    return q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)


def _unstack(out, shape):
    batch, queries, heads, head_dim = shape
    out = out.reshape(batch, heads, queries, head_dim)
    return out.swapaxes(1, 2)
