"""Matrix products of sorted rows with one matrix a group (expert GEMMs)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BACKENDS = ("tiles", "ragged_dot")


def row_alignment(rows: int, groups: int, backend: str) -> int:
    """To what multiple each group's rows are padded: 1, or the tile of the tiled backend.

    A tile is about a quarter of a balanced group, so that padding stays near an eighth.
    """
    if backend == "ragged_dot":
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
      group_sizes: int32, rows a group (multiples of `alignment`); rows past their sum are unused.
      alignment: from `row_alignment`.
      backend: "tiles": one batched matmul over tiles with their group's matrix (CPU: XLA runs
        ragged_dot dense there, groups times the work). "ragged_dot": jax.lax.ragged_dot, native
        on TPU.

    Raises: ValueError for an unknown backend.
    """
    if backend == "ragged_dot":
        return jax.lax.ragged_dot(x, w, group_sizes)
    if backend != "tiles":
        raise ValueError(f"grouped_matmul backend {backend!r}: choose one of {BACKENDS}")
    tiles = x.reshape(-1, alignment, x.shape[-1])
    starts = jnp.arange(tiles.shape[0]) * alignment
    group = jnp.searchsorted(jnp.cumsum(group_sizes), starts, side="right")
    group = jnp.minimum(group, w.shape[0] - 1)
    return jnp.einsum("tmd,tdf->tmf", tiles, w[group]).reshape(x.shape[0], w.shape[-1])
