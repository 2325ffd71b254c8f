"""Keys and values of finished tokens, one row of the batch a sequence.

Both kinds are head-major: the keys of one head are a matrix [positions, head_dim] wherever they
are read, which is a tile for the TPU's copy engine and an operand without a transpose elsewhere.
"""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ContiguousCache:
    """Every sequence in a stretch of its own. lengths: int32, positions that count; what lies
    beyond them may be anything, NaN included."""

    k: Float[Array, "batch kv_heads capacity head_dim"]
    v: Float[Array, "batch kv_heads capacity head_dim"]
    lengths: Int[Array, " batch"]

    @property
    def capacity(self) -> int:
        """Positions that a sequence has room for."""
        return self.k.shape[2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Sequences scattered over pages of a shared pool.

    page_table: int32, the page of positions [i * page_size, (i + 1) * page_size) of a sequence;
    entries wholly beyond its length may be anything. lengths: as in ContiguousCache.
    """

    k_pages: Float[Array, "pages kv_heads page_size head_dim"]
    v_pages: Float[Array, "pages kv_heads page_size head_dim"]
    page_table: Int[Array, "batch sequence_pages"]
    lengths: Int[Array, " batch"]

    @property
    def page_size(self) -> int:
        """Positions a page."""
        return self.k_pages.shape[2]

    @property
    def capacity(self) -> int:
        """Positions that a sequence has room for."""
        return self.page_table.shape[1] * self.page_size


Cache = ContiguousCache | PagedCache
