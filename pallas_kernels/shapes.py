"""Named attention shapes of LLaDA2 and rows of packed documents, for tests and benchmarks."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from pallas_kernels.block_layout import (
    CLEAN,
    NOISY,
    BlockLayout,
    block_index,
    both_halves,
    half_layout,
)


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Heads of one attention layer."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.heads // self.kv_heads


ATTENTION = {
    "tiny": AttentionShape(heads=4, kv_heads=2, head_dim=16),
    "mini": AttentionShape(heads=16, kv_heads=4, head_dim=128),  # LLaDA2.0-mini, 16B
    "flash": AttentionShape(heads=32, kv_heads=4, head_dim=128),  # LLaDA2.0-flash, 100B
}

ROW_LENGTHS = (4096, 8192, 16384, 32768, 65536)
"""Tokens of a row; training attention sees twice as many positions."""

DOCUMENTS = ("none", "aligned", "straddling", "many_tiny", "one_token")
"""Kinds of rows that `document_lengths` draws, beside rows of a given mean length."""


def document_lengths(
    rng: np.random.Generator, length: int, documents: str | float, block_size: int = 32
) -> list[int]:
    """Lengths of the documents that fill a row.

    documents: "none": the row is one document. "aligned": a few, of whole blocks. "straddling": a
      few, that begin and end inside blocks. "many_tiny": of 1 to 8 tokens. "one_token": of one. A
      number: exponential lengths of that mean.
    """
    draws = {
        "none": lambda: length,
        "aligned": lambda: block_size * int(rng.integers(1, max(2, length // (3 * block_size)))),
        "straddling": lambda: int(rng.integers(length // 8 + 1, length // 2 + 2)) | 1,
        "many_tiny": lambda: int(rng.integers(1, 9)),
        "one_token": lambda: 1,
    }
    if isinstance(documents, str):
        if documents not in draws:
            raise ValueError(
                f"documents={documents!r}: choose one of {DOCUMENTS}, or a mean length"
            )
        draw = draws[documents]
    else:
        draw = lambda: max(1, math.ceil(rng.exponential(documents)))  # noqa: E731
    lengths, left = [], length
    while left:
        lengths.append(min(draw(), left))
        left -= lengths[-1]
    return lengths


def packed_rows(
    rng: np.random.Generator,
    rows: int,
    length: int,
    documents: str | float,
    *,
    block_size: int = 32,
    padding: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions, int32 [rows, length], of rows that end in `padding` tokens."""
    segments = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for segment, position in zip(segments, positions, strict=True):
        lengths = document_lengths(rng, length - padding, documents, block_size)
        segment[: length - padding] = np.repeat(np.arange(len(lengths)) + 1, lengths)
        position[: length - padding] = np.concatenate([np.arange(n) for n in lengths])
    return segments, positions


def packed_layout(
    rng: np.random.Generator,
    rows: int,
    length: int,
    documents: str | float,
    *,
    block_size: int,
    anchor: str = "document",
    halves: str = "both",
    padding: int = 0,
) -> BlockLayout:
    """The layout of `packed_rows`. halves: "both" of 2 x length tokens, "noisy" or "clean"."""
    drawn = packed_rows(rng, rows, length, documents, block_size=block_size, padding=padding)
    segments, positions = drawn
    block = block_index(positions, block_size, anchor)
    if halves == "both":
        return both_halves(block, segments)
    return half_layout(block, segments, {"noisy": NOISY, "clean": CLEAN}[halves])
