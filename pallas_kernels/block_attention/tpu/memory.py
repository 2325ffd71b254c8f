"""What fits a TPU core: keys and values in VMEM, a schedule in scalar memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_attention.tpu.schedule import Tiles

SCALAR_MEMORY = 1 << 20  # bytes, of every TPU since v4
SMALLEST_VMEM = 64 << 20  # of v5p and tpu7x; v5e and v6e have 128 MiB
LANES, SUBLANES = 128, 8  # of a register: the last two axes of an array are rounded up to them
SPARE = 4 << 20  # for what the compiler keeps


def vmem_of_chip() -> int:
    """VMEM of a core that is compiled for, in bytes: of the default device, or of the one that
    `jax.sharding.use_abstract_mesh` describes; the smallest there is where that is no TPU."""
    return pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else SMALLEST_VMEM


@dataclasses.dataclass(frozen=True)
class Pass:
    """Forward or backward. matmuls: for each pair. gradients: those of keys and values, in fp32,
    stay beside them."""

    matmuls: int
    gradients: bool

    def bytes_per_key(self, head_dim: int, dtype: jax.typing.DTypeLike) -> int:
        """VMEM of a resident key. Twice, since the next row or head is fetched while this one is at
        work."""
        each = jnp.dtype(dtype).itemsize + (4 if self.gradients else 0)
        return 2 * 2 * _lanes(head_dim) * each

    def working_bytes(
        self, rows: int, head_dim: int, dtype: jax.typing.DTypeLike, tiles: Tiles
    ) -> int:
        """VMEM of all else, at most. rows: of a tile of queries, its heads counted."""
        matrices = 2 * jnp.dtype(dtype).itemsize + 2 * 4  # q, d_output; carried sums in and out
        statistics = 4 * SUBLANES * 4  # lse, delta, and as many carried, a row of each
        of_tile = rows * (matrices * _lanes(head_dim) + statistics)
        sums = rows * _lanes(head_dim) * 4
        step = self.matmuls * tiles.wide * rows * 4  # generous: a step's scores and what follows
        return 2 * of_tile + sums + step + SPARE

    def strip_length(
        self, keys: int, rows: int, head_dim: int, dtype: jax.typing.DTypeLike, tiles: Tiles
    ) -> int:
        """Keys that one call holds: the row, or an equal part of it.

        Raises: ValueError where not even one window fits.
        """
        vmem = tiles.vmem_bytes or vmem_of_chip()
        working = self.working_bytes(rows, head_dim, dtype, tiles)
        size = self.bytes_per_key(head_dim, dtype)
        most = (vmem - working) // size // tiles.keys * tiles.keys
        if most <= 0:
            raise ValueError(
                f"{vmem} bytes of VMEM do not hold {tiles.keys} keys of {size} bytes beside the "
                f"{working} bytes of a tile of {rows} rows: lower Tiles.queries or Tiles.wide"
            )
        strips = pl.cdiv(keys, most)
        return pl.cdiv(pl.cdiv(keys, strips), tiles.keys) * tiles.keys


FORWARD = Pass(matmuls=2, gradients=False)
BACKWARD = Pass(matmuls=5, gradients=True)


def check_scalars(what: str, numbers: Iterable[Any], way_out: str) -> None:
    """Raises: ValueError where int32 arrays do not fit scalar memory together."""
    needed = 4 * sum(math.prod(x.shape) for x in numbers)
    if needed > SCALAR_MEMORY:
        raise ValueError(
            f"{what} takes {needed} of {SCALAR_MEMORY} bytes of scalar memory: {way_out}"
        )


def _lanes(head_dim: int) -> int:
    return pl.cdiv(head_dim, LANES) * LANES
