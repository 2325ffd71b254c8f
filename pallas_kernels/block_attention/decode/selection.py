"""Which decode backend "auto" is: the platform's kernel, if it proves itself on the device."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_attention.decode.cache import Cache, ContiguousCache, PagedCache
from pallas_kernels.block_attention.selection import TOLERANCE
from pallas_kernels.block_layout import CLEAN, NOISY, concatenate, half_layout

logger = logging.getLogger(__name__)

KERNELS = ("tpu", "gpu")
"""Backends that are kernels; each is named after its platform."""

_PAGE = 64  # positions a page of the check's paged cache


def select(attend: Callable[..., jax.Array], q, k, cache: Cache) -> str:
    """The backend for arrays like these (only shapes and dtypes are read) on the default device.

    The platform's kernel is compiled, run and compared with the oracle, once per process, kind of
    cache and shape of heads; also while something else is being traced.

    Args:
      attend: called as (q, k, v, own, cache, backend=candidate).
    """
    group, paged = q.shape[2] // k.shape[2], isinstance(cache, PagedCache)
    return _select(attend, jax.local_devices()[0], group, q.shape[3], jnp.dtype(q.dtype), paged)


@functools.cache
def _select(attend, device, group: int, head_dim: int, dtype, paged: bool) -> str:
    kind = "paged" if paged else "contiguous"
    where = f"{device.device_kind} ({kind}, {group} query heads a key head, {head_dim}, {dtype})"
    if device.platform in KERNELS:
        # A thread of its own, because a function may be under trace in this one.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            fault = thread.submit(
                self_check, attend, device.platform, device, group, head_dim, dtype, paged
            ).result()
        if fault is None:
            logger.info("decode: %r on %s, proven against the oracle", device.platform, where)
            return device.platform
        logger.warning("decode: %r is not used on %s: %s", device.platform, where, fault)
    logger.info("decode: 'xla' on %s", where)
    return "xla"


def self_check(
    attend, backend: str, device, group: int, head_dim: int, dtype, paged: bool
) -> str | None:
    """What is wrong with a backend on the device, or None."""
    arguments = jax.device_put(sample(group, head_dim, dtype, paged), device)

    def run(backend):
        return jax.jit(functools.partial(attend, backend=backend))(*arguments)

    try:
        actual = np.asarray(run(backend), np.float32)
    except Exception as error:  # whatever a compiler or a driver throws at a kernel
        return f"{type(error).__name__}: {error}"
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(run("reference"), np.float32)
    error = np.abs(actual - expected).max() / max(1.0, np.abs(expected).max())
    if not error <= TOLERANCE:  # so that NaN fails
        return f"the output is off by {error:.2g} of its largest value, {TOLERANCE} allowed"
    return None


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
