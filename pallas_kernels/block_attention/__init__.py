"""Attention under a BlockLayout: `block_attention` is the entry, `attend_reference` the oracle."""

from pallas_kernels.block_attention.api import BACKENDS, KeyValues, block_attention
from pallas_kernels.block_attention.reference import attend_reference
from pallas_kernels.block_attention.residuals import KEPT

__all__ = ["BACKENDS", "KEPT", "KeyValues", "attend_reference", "block_attention"]
