"""The typed entry to attention under a BlockLayout."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_attention.reference import attend_reference
from pallas_kernels.block_attention.self_check import select
from pallas_kernels.block_attention.splash import attend_splash
from pallas_kernels.block_attention.xla import attend_xla
from pallas_kernels.block_layout import PADDING, BlockLayout, concatenate, key_intervals

KeyValues = tuple[Array, Array, BlockLayout]
"""Keys and values [batch, keys, kv_heads, head_dim] and where they stand."""

TOY_KEYS = 2048
"""The most keys a row that backend "reference" takes: its scores are dense."""


# Pallas takes seconds to import, so each kernel is imported when it is used.


def _attend_tpu(q, k, v, layout, queries, at):
    from pallas_kernels.block_attention.tpu import attend_tpu

    intervals = key_intervals(layout)
    if at is None:
        return attend_tpu(q, k, v, intervals)
    return attend_tpu(q, k, v, intervals.at(at), real=layout.segment != PADDING)


def _attend_gpu(q, k, v, layout, queries, at, implementation=None):
    from pallas_kernels.block_attention.gpu import attend_gpu

    intervals = key_intervals(layout)
    intervals = intervals if at is None else intervals.at(at)
    return attend_gpu(q, k, v, intervals, implementation=implementation)


def _attend_splash(q, k, v, layout, queries, at):
    if at is not None:
        raise ValueError("attention backend 'splash' takes whole rows: choose 'tpu' or 'xla'")
    return attend_splash(q, k, v, layout)


_SELF_ATTENTION = {
    "tpu": _attend_tpu,
    "gpu": _attend_gpu,
    "mosaic": functools.partial(_attend_gpu, implementation="mosaic"),
    "triton": functools.partial(_attend_gpu, implementation="triton"),
    "splash": _attend_splash,
    "xla": lambda q, k, v, layout, queries, at: attend_xla(q, [(k, v, layout)], queries),
    "reference": lambda q, k, v, layout, queries, at: attend_reference(q, k, v, queries, layout),
}

BACKENDS = ("auto", *_SELF_ATTENTION)


def block_attention(
    q: Float[Array, "batch queries heads head_dim"],
    parts: Sequence[KeyValues],
    queries: BlockLayout,
    *,
    at: Int[Array, " queries"] | None = None,
    backend: str = "auto",
) -> Float[Array, "batch queries heads head_dim"]:
    """Attention of block queries over one or more parts of keys (own keys, KV cache).

    The kernels are for tokens that attend to themselves: one part, whose layout is `queries`, the
    same object, or whose tokens `at` are the queries. For other parts "auto" is the XLA path, and a
    kernel an error; `decode_attention` has kernels for a cache.

    A kernel is opaque to GSPMD: under a mesh, call this inside `jax.shard_map`, on the local rows
    and heads.

    Args:
      q: [batch, queries, heads, head_dim]; heads is a multiple of kv_heads (grouped queries).
      parts: keys, values and layout of each part.
      queries: layout of the queries.
      at: int32, which tokens of the only part the queries are, the same ones in each row: a device
        has them of a row that is cut (see `zigzag`), and the keys of all.
      backend: one of BACKENDS. "auto": a kernel where one proves itself on the device at hand (see
        `self_check`), else "xla". "gpu" is "mosaic" or "triton", whichever suits the GPU. "splash"
        needs tokamax. "reference" is the dense oracle.

    Returns: the shape and dtype of q; zeros where a query has no key.
    Raises: ValueError for an unknown backend, for a kernel with other keys than the queries' own,
      and for "reference" beyond TOY_KEYS keys.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r}: choose one of {BACKENDS}")
    k, v, layout = parts[0]
    if len(parts) == 1 and (layout is queries or at is not None):
        return _attend_to_self(q, k, v, layout, queries, at, backend=backend)
    if backend in ("auto", "xla"):
        return attend_xla(q, parts, queries)
    if backend != "reference":
        raise ValueError(
            f"attention backend {backend!r} takes one part, the queries' own keys with the same "
            f"layout object; here are {len(parts)} parts of other keys. Choose 'auto' or 'xla', or "
            "decode_attention for a cache"
        )
    keys, values, layouts = zip(*parts, strict=True)
    k, v = jnp.concatenate(keys, axis=1), jnp.concatenate(values, axis=1)
    _check_toy_size(k)
    return attend_reference(q, k, v, queries, concatenate(layouts))


def _attend_to_self(q, k, v, layout: BlockLayout, queries=None, at=None, *, backend: str):
    if backend == "auto":
        backend = select(_attend_to_self, q, k, layout)
    if backend == "reference":
        _check_toy_size(k)
    return _SELF_ATTENTION[backend](q, k, v, layout, queries or layout, at)


def _check_toy_size(k) -> None:
    if k.shape[1] > TOY_KEYS:
        raise ValueError(
            f"attention backend 'reference' holds all scores at once: {k.shape[1]} keys, at most "
            f"{TOY_KEYS}. Choose 'auto', or call attend_reference yourself"
        )
