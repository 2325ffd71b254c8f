"""Who attends to whom: the one attention rule of block diffusion.

**A query sees every earlier clean block, and its own block in its own half, within its document**
(arXiv 2512.15745, eq. 3 and 4). Every attention path of the project derives from the coordinates
declared here: the dense oracle, the XLA path, the kernels, the KV cache and the tests.

Special cases are choices of coordinates, not of code:

====================  =======================================================
autoregressive        one clean half, block size 1
MDLM                  one noisy half, one block per document
BDLM training         a noisy and a clean half over the same tokens
prefill               one clean half
denoising step        the current block as the noisy half, against cached clean keys
====================  =======================================================
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

NOISY, CLEAN = 0, 1
PADDING = 0  # the segment id that sees nothing and is seen by nothing

HostOrDevice = Array | np.ndarray
"""What a step takes: NumPy from the loader, JAX inside it."""

Scalar = Array | np.ndarray | np.number
"""The same for one number."""


def one_program[**P, R](function: Callable[P, R], **static: Any) -> Callable[P, R]:
    """Decorator: outside a trace the function runs as one program instead of one for each
    operation, each compiled by itself; inside one it leaves no mark.

    static: static_argnames, as of `jax.jit`.
    """
    return jax.jit(function, inline=True, **static)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """Coordinates of the tokens along one axis (queries or keys).

    block: int32 [batch, length], index of the block inside its document.
    segment: int32 [batch, length], document within the row; 0 is padding.
    spans: static ((half, length), ...): which half each stretch of the axis belongs to.
    """

    block: Int[Array, "batch length"]
    segment: Int[Array, "batch length"]
    spans: tuple[tuple[int, int], ...] = dataclasses.field(metadata={"static": True})

    @property
    def half(self) -> Int[Array, " length"]:
        """int32 [length]: NOISY or CLEAN."""
        return jnp.concatenate([jnp.full((n,), half, jnp.int32) for half, n in self.spans])

    def split(self) -> list[BlockLayout]:
        """One layout per span, in order."""
        parts, start = [], 0
        for half, n in self.spans:
            cut = slice(start, start + n)
            parts.append(BlockLayout(self.block[:, cut], self.segment[:, cut], ((half, n),)))
            start += n
        return parts


def concatenate(layouts: Sequence[BlockLayout]) -> BlockLayout:
    """Layouts one after the other along the length axis."""
    return BlockLayout(
        jnp.concatenate([x.block for x in layouts], axis=1),
        jnp.concatenate([x.segment for x in layouts], axis=1),
        tuple(span for x in layouts for span in x.spans),
    )


@functools.partial(one_program, static_argnames="anchor")
def block_index(
    positions: Int[HostOrDevice, "batch length"],
    block_size: int | Int[Scalar, ""],
    anchor: str,
) -> Int[Array, "batch length"]:
    """Block of every token of a packed row.

    Args:
      positions: int32, position of each token inside its document.
      block_size: tokens a block; may be a traced scalar, so that a change costs no recompilation.
      anchor: "document": blocks restart with each document, as inference sees them.
        "row": blocks are cut on row indices (the paper's eq. 3); the document mask cuts a block
        that holds two documents.

    Returns: int32 [batch, length].
    """
    positions = jnp.asarray(positions)
    if anchor == "document":
        return positions // block_size
    if anchor == "row":
        rows = jnp.arange(positions.shape[1], dtype=positions.dtype) // block_size
        return jnp.broadcast_to(rows, positions.shape)
    raise ValueError(f"anchor={anchor!r}: choose 'document' or 'row'")


def half_layout(block, segment, half: int) -> BlockLayout:
    """A single half (NOISY: MDLM or a denoising step; CLEAN: AR or prefill)."""
    return BlockLayout(block, segment, ((half, block.shape[1]),))


@one_program
def both_halves(block, segment) -> BlockLayout:
    """The training input [noisy ; clean] of 2·length tokens (eq. 4)."""
    return concatenate([half_layout(block, segment, NOISY), half_layout(block, segment, CLEAN)])


@one_program
def allowed(queries: BlockLayout, keys: BlockLayout) -> Bool[Array, "batch queries keys"]:
    """The rule itself as a dense mask: True where a query may see a key."""
    q_block, q_segment = queries.block[:, :, None], queries.segment[:, :, None]
    k_block, k_segment = keys.block[:, None, :], keys.segment[:, None, :]
    q_half, k_half = queries.half[None, :, None], keys.half[None, None, :]
    earlier_clean = (k_half == CLEAN) & (k_block < q_block)
    own_block = (k_half == q_half) & (k_block == q_block)
    same_document = (q_segment == k_segment) & (q_segment != PADDING)
    return same_document & (earlier_clean | own_block)


@one_program
def group_bounds(
    block: Int[Array, "batch length"], segment: Int[HostOrDevice, "batch length"]
) -> tuple[Int[Array, "batch length"], Int[Array, "batch length"]]:
    """Row indices [start, end) of the run of equal (segment, block) that holds each token.

    Runs are contiguous in a packed row. Pass zeros as `block` for the bounds of the document.
    """
    length = block.shape[1]
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), block.shape)
    changed = (block[:, 1:] != block[:, :-1]) | (segment[:, 1:] != segment[:, :-1])
    edge = jnp.ones((block.shape[0], 1), bool)
    starts = jnp.where(jnp.concatenate([edge, changed], 1), index, 0)
    ends = jnp.where(jnp.concatenate([changed, edge], 1), index + 1, length)
    return jax.lax.cummax(starts, axis=1), jax.lax.cummin(ends, axis=1, reverse=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyIntervals:
    """The keys of every query as two runs of indices, which is what the kernels compute on.

    own: the query's own block, in its own half. earlier: the clean blocks before it, in its
    document. Each is a pair int32 [batch, queries] of bounds [start, end) on the key axis; a run
    without keys has start == end. Of a clean query the two touch: earlier[1] == own[0].
    """

    own: tuple[Int[Array, "batch queries"], Int[Array, "batch queries"]]
    earlier: tuple[Int[Array, "batch queries"], Int[Array, "batch queries"]]

    def at(self, queries: Int[Array, " some"]) -> KeyIntervals:
        """Those of some of the queries."""
        return jax.tree.map(lambda bound: bound[:, queries], self)

    def count(self) -> Int[Array, "batch queries"]:
        """int32 [batch, queries]: keys of each query."""
        return (self.own[1] - self.own[0]) + (self.earlier[1] - self.earlier[0])

    def pairs(self) -> int:
        """Query-key pairs of all rows, the ideal work: summed on the host, since rows of 65536
        tokens have more than 2**31."""
        return int(np.asarray(self.count()).sum(dtype=np.int64))


@one_program
def key_intervals(layout: BlockLayout) -> KeyIntervals:
    """`allowed(layout, layout)` as intervals, in O(length), for tokens that attend to themselves.

    Args:
      layout: one half, or `both_halves` of a packed row: documents are contiguous and blocks do not
        decrease inside one.

    Raises: ValueError for other spans (a clean half must hold the tokens of the noisy one).
    """
    halves = tuple(half for half, _ in layout.spans)
    lengths = {n for _, n in layout.spans}
    if halves not in ((NOISY,), (CLEAN,), (NOISY, CLEAN)) or len(lengths) != 1:
        raise ValueError(f"spans {layout.spans}: intervals need one half, or both of one length")
    (length,) = lengths
    block, segment = layout.block[:, :length], layout.segment[:, :length]
    start, end = group_bounds(block, segment)
    document, _ = group_bounds(jnp.zeros_like(block), segment)
    real = segment != PADDING
    start, end, document = (jnp.where(real, x, 0) for x in (start, end, document))
    if halves == (NOISY,):
        document = start  # no clean half, nothing earlier
    clean = (len(halves) - 1) * length  # where the clean half begins
    at = [i * length for i in range(len(halves))]

    def along(x, offsets):
        return jnp.concatenate([x + offset for offset in offsets], axis=1)

    own = along(start, at), along(end, at)
    earlier = along(document, [clean] * len(at)), along(start, [clean] * len(at))
    return KeyIntervals(own, earlier)


def zigzag(spans: Sequence[tuple[int, int]], ways: int) -> np.ndarray:
    """Which tokens of a row each of `ways` devices takes, int [ways, length / ways].

    Of every half a device has a piece from the front and one from the back, and so early tokens,
    which see little, with late ones, which see much: without documents all have equal pairs.

    Raises: ValueError where a half does not divide into 2 · ways pieces.
    """
    parts, start = [], 0
    for _, length in spans:
        if length % (2 * ways):
            raise ValueError(f"{length} tokens do not divide into 2 x {ways} pieces")
        pieces = np.arange(start, start + length).reshape(2 * ways, -1)
        parts += [pieces[:ways], pieces[: ways - 1 : -1]]
        start += length
    return np.concatenate(parts, axis=1)


def zigzag_imbalance(layout: BlockLayout, ways: int) -> np.ndarray:
    """Query-key pairs of the busiest device over the mean, under `zigzag`, of each row."""
    pairs = np.asarray(key_intervals(layout).count(), np.int64)
    shares = pairs[:, zigzag(layout.spans, ways)].sum(-1)
    return shares.max(1) / np.maximum(shares.mean(1), 1)
