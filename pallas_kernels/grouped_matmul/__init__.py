"""Matrix products of sorted rows with one matrix a group (expert GEMMs)."""

from pallas_kernels.grouped_matmul.api import (
    BACKENDS,
    chosen_backend,
    grouped_matmul,
    row_alignment,
)

__all__ = ["BACKENDS", "chosen_backend", "grouped_matmul", "row_alignment"]
