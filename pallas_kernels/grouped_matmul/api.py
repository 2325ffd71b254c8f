"""The product, and which of its backends is for which device."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.selection import device_at_hand, difference, first_proven

BACKENDS = ("auto", "tiles", "ragged_dot", "tokamax")

PREFERENCES = {"gpu": ("tokamax",)}
"""Kernels that "auto" takes where they prove themselves, by platform."""


def chosen_backend(backend: str, shape: tuple[int, int, int], dtype) -> str:
    """What "auto" is for matrices of this shape [groups, d, f] and dtype; others are themselves.

    XLA's ragged_dot on TPU, where it is native. On GPU, where XLA multiplies all rows with every
    matrix, tokamax's kernel once it has proven itself on the device, and else tiles, as on CPU.

    Raises: ValueError for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"grouped_matmul backend {backend!r}: choose one of {BACKENDS}")
    if backend != "auto":
        return backend
    if device_at_hand()[0].platform == "tpu":
        return "ragged_dot"
    prove = functools.partial(_self_check, shape=shape, dtype=dtype)
    where = f"{jnp.dtype(dtype)}{list(shape)}"
    return first_proven("grouped matmul", PREFERENCES, prove, where, otherwise="tiles")


def row_alignment(rows: int, groups: int, backend: str) -> int:
    """To what multiple each group's rows are padded: 1, or the tile of the tiled backend.

    A tile is about a quarter of a balanced group, so that padding stays near an eighth.
    """
    if backend != "tiles":
        return 1
    tile = 8
    while tile < 128 and tile * 4 * groups <= rows:
        tile *= 2
    return tile


def grouped_matmul(
    x: Float[Array, "rows d"],
    w: Float[Array, "groups d f"],
    group_sizes: Int[Array, " groups"],
    *,
    alignment: int,
    backend: str = "tiles",
) -> Float[Array, "rows f"]:
    """Rows of group g times w[g]; rows come sorted by group.

    Args:
      x: rows, sorted by group; with "tiles" each group starts on a multiple of `alignment`.
      w: one matrix a group.
      group_sizes: int32, rows a group (multiples of `alignment`); rows past their sum are unused,
        and finite.
      alignment: from `row_alignment`.
      backend: of `chosen_backend`. "tiles": one batched matmul over tiles with their group's matrix
        (CPU: XLA runs ragged_dot dense there, groups times the work). "ragged_dot":
        jax.lax.ragged_dot, native on TPU. "tokamax": its GPU kernels; on other platforms what
        XLA makes of it.

    Raises: ValueError for an unknown backend; ImportError for "tokamax" without it.
    """
    if backend == "ragged_dot":
        return jax.lax.ragged_dot(x, w, group_sizes)
    if backend == "tokamax":
        return _tokamax(x, w, group_sizes)
    if backend != "tiles":
        raise ValueError(f"grouped_matmul backend {backend!r}: choose one of {BACKENDS[1:]}")
    tiles = x.reshape(-1, alignment, x.shape[-1])
    starts = jnp.arange(tiles.shape[0]) * alignment
    group = jnp.searchsorted(jnp.cumsum(group_sizes), starts, side="right")
    group = jnp.minimum(group, w.shape[0] - 1)
    return jnp.einsum("tmd,tdf->tmf", tiles, w[group]).reshape(x.shape[0], w.shape[-1])


def _tokamax(x, w, group_sizes):
    """A kernel by name: left to choose, tokamax falls back on XLA's dense product. Kernels do not
    write rows past the groups, neither of the output nor of x's gradient."""
    from tokamax import ragged_dot

    on_gpu = device_at_hand()[0].platform == "gpu"
    kernel: Any = "mosaic_gpu" if on_gpu else "xla"
    used = (jnp.arange(x.shape[0], dtype=jnp.int32) < group_sizes.sum())[:, None]
    x = jnp.where(used, x, jnp.zeros((), x.dtype))
    out = ragged_dot(x, w, group_sizes, implementation=kernel)
    return jnp.where(used, out, jnp.zeros((), out.dtype))


def _self_check(backend: str, device, *, shape: tuple[int, int, int], dtype) -> str | None:
    """What is wrong with a backend on the device for four such matrices, one of them without rows,
    forward or backward, or None. Raises what compiling or running raises."""
    _, d, f = shape
    sizes, rows = np.array([200, 0, 57, 127], np.int32), 512
    of_group = np.repeat(np.eye(4), sizes, axis=0)
    of_group = np.pad(of_group, ((0, rows - len(of_group)), (0, 0)))
    rng = np.random.default_rng(0)

    def dense(x, w):
        return jnp.einsum("md,gdf,mg->mf", x, w, jnp.asarray(of_group, x.dtype))

    def grouped(x, w):
        return grouped_matmul(x, w, jnp.asarray(sizes), alignment=1, backend=backend)

    with jax.default_device(device):
        arrays = [rng.normal(size=s) for s in ((rows, d), (4, d, f), (rows, f))]
        x, w, cotangent = (jnp.asarray(a, dtype) for a in arrays)

        def run(function):
            output, pull = jax.vjp(jax.jit(function), x, w)
            return output, *pull(cotangent)

        actual = run(grouped)
        with jax.default_matmul_precision("highest"):
            return difference(("output", "d_x", "d_w"), actual, run(dense))
