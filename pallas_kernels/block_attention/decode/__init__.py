"""Attention of the block under way over a KV cache: `decode_attention` is the entry."""

from pallas_kernels.block_attention.decode.api import (
    DECODE_BACKENDS,
    decode_attention,
    decode_backend,
)
from pallas_kernels.block_attention.decode.cache import ContiguousCache, PagedCache

__all__ = [
    "DECODE_BACKENDS",
    "ContiguousCache",
    "PagedCache",
    "decode_attention",
    "decode_backend",
]
