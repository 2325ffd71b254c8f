"""The typed entry to attention under a BlockLayout."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_attention.reference import attend_reference
from pallas_kernels.block_attention.self_check import select
from pallas_kernels.block_attention.splash import attend_splash
from pallas_kernels.block_attention.xla import attend_xla
from pallas_kernels.block_layout import BlockLayout, concatenate, key_intervals

KeyValues = tuple[Array, Array, BlockLayout]
"""Keys and values [batch, keys, kv_heads, head_dim] and where they stand."""

TOY_KEYS = 2048
"""The most keys a row that backend "reference" takes: its scores are dense."""


# Pallas takes seconds to import, so each kernel is imported when it is used.


def _attend_tpu(q, k, v, layout):
    from pallas_kernels.block_attention.tpu import attend_tpu

    return attend_tpu(q, k, v, key_intervals(layout))


def _attend_gpu(q, k, v, layout, implementation=None):
    from pallas_kernels.block_attention.gpu import attend_gpu

    return attend_gpu(q, k, v, key_intervals(layout), implementation=implementation)


_SELF_ATTENTION = {
    "tpu": _attend_tpu,
    "gpu": _attend_gpu,
    "mosaic": functools.partial(_attend_gpu, implementation="mosaic"),
    "triton": functools.partial(_attend_gpu, implementation="triton"),
    "splash": attend_splash,
    "xla": lambda q, k, v, layout: attend_xla(q, [(k, v, layout)], layout),
    "reference": lambda q, k, v, layout: attend_reference(q, k, v, layout, layout),
}

BACKENDS = ("auto", *_SELF_ATTENTION)


def block_attention(
    q: Float[Array, "batch queries heads head_dim"],
    parts: Sequence[KeyValues],
    queries: BlockLayout,
    *,
    backend: str = "auto",
) -> Float[Array, "batch queries heads head_dim"]:
    """Attention of block queries over one or more parts of keys (own keys, KV cache).

    The kernels are for tokens that attend to themselves: one part, whose layout is `queries`, the
    same object. For other parts "auto" is the XLA path, and a kernel an error; `decode_attention`
    has kernels for a cache.

    A kernel is opaque to GSPMD: under a mesh, call this inside `jax.shard_map`, on the local rows
    and heads.

    Args:
      q: [batch, queries, heads, head_dim]; heads is a multiple of kv_heads (grouped queries).
      parts: keys, values and layout of each part.
      queries: layout of the queries.
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
    if len(parts) == 1 and layout is queries:
        return _attend_to_self(q, k, v, layout, backend=backend)
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


def _attend_to_self(q, k, v, layout: BlockLayout, *, backend: str):
    if backend == "auto":
        backend = select(_attend_to_self, q, k, layout)
    if backend == "reference":
        _check_toy_size(k)
    return _SELF_ATTENTION[backend](q, k, v, layout)


def _check_toy_size(k) -> None:
    if k.shape[1] > TOY_KEYS:
        raise ValueError(
            f"attention backend 'reference' holds all scores at once: {k.shape[1]} keys, at most "
            f"{TOY_KEYS}. Choose 'auto', or call attend_reference yourself"
        )
