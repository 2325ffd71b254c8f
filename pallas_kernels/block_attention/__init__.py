"""Attention under a BlockLayout: `block_attention` is the entry, `attend_reference` the oracle."""

from pallas_kernels.block_attention.api import BACKENDS, KeyValues, block_attention
from pallas_kernels.block_attention.reference import attend_reference

__all__ = ["BACKENDS", "KeyValues", "attend_reference", "block_attention"]
