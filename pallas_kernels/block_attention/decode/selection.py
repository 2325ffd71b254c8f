"""The proof that "auto" asks of a decode kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_attention.decode.cache import Cache, ContiguousCache, PagedCache
from pallas_kernels.block_layout import CLEAN, NOISY, BlockLayout, concatenate, half_layout
from pallas_kernels.selection import difference, first_proven

KERNELS = ("tpu", "gpu")
"""Backends that are kernels; each is named after its platform."""

PREFERENCES = {platform: (platform,) for platform in KERNELS}

_PAGE = 64  # positions a page of the check's paged cache


def select(attend: Callable[..., jax.Array], q, k, v, own: BlockLayout, cache: Cache) -> str:
    """The backend for arrays like these (only shapes and dtypes are read), proven once for each.

    Args:
      attend: called as (q, k, v, own, cache, backend=candidate).
    """
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (q, k, v, own, cache))

    def prove(backend: str, device) -> str | None:
        return self_check(attend, backend, device, *like)

    shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(like))
    where = f"{type(cache).__name__}, spans {own.spans}, {shapes}"
    return first_proven("decode backend", PREFERENCES, prove, where)


def self_check(attend, backend: str, device, q, k, v, own, cache: Cache) -> str | None:
    """What is wrong with a backend on the device, or None.

    It is compiled for arrays like these, and run on a small cache with their heads: the loop over
    a longer one is the same. Raises what compiling or running raises.
    """
    paged = isinstance(cache, PagedCache)
    arguments = sample(q.shape[2] // k.shape[2], q.shape[3], q.dtype, paged)

    def run(backend):
        return [jax.jit(functools.partial(attend, backend=backend))(*arguments)]

    with jax.default_device(device):
        jax.jit(functools.partial(attend, backend=backend)).lower(q, k, v, own, cache).compile()
        arguments = jax.device_put(arguments, device)
        actual = run(backend)
        with jax.default_matmul_precision("highest"):
            return difference(["output"], actual, run("reference"))


def sample(group: int, head_dim: int, dtype, paged: bool):
    """What the check runs on: a block to commit beside the next one, in three rows of which one is
    idle and one has no cache; NaN wherever nobody may look."""
    rng = np.random.default_rng(0)
    rows, kv_heads, block, pages = 3, 2, 32, 24
    lengths, capacity = np.array([1100, 0, 700], np.int32), _PAGE * pages

    def layout(index, half, present):
        shape = (rows, block)
        segment = np.broadcast_to(np.array(present, np.int32)[:, None], shape)
        return half_layout(np.full(shape, index, np.int32), segment, half)

    own = concatenate([layout(0, CLEAN, (1, 0, 0)), layout(1, NOISY, (1, 1, 0))])

    def tokens(heads):
        return jnp.asarray(rng.normal(size=(rows, 2 * block, heads, head_dim)), dtype)

    def cached():
        x = rng.normal(size=(rows, pages, _PAGE, kv_heads, head_dim))
        x[np.arange(capacity).reshape(pages, _PAGE) >= lengths[:, None, None]] = np.nan
        return jnp.asarray(x, dtype).swapaxes(2, 3)

    q, k, v = tokens(group * kv_heads), tokens(kv_heads), tokens(kv_heads)
    pools = [cached() for _ in range(2)]
    if paged:
        table = jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages)
        k_pages, v_pages = (x.reshape(-1, *x.shape[2:]) for x in pools)
        return q, k, v, own, PagedCache(k_pages, v_pages, table, jnp.asarray(lengths))
    k_cache, v_cache = (x.swapaxes(1, 2).reshape(rows, kv_heads, capacity, head_dim) for x in pools)
    return q, k, v, own, ContiguousCache(k_cache, v_cache, jnp.asarray(lengths))
