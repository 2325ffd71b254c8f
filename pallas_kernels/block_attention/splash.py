"""Tokamax's splash attention under a BlockLayout: the second opinion on TPU.

Splash takes its mask as a function of (a number per query, index of the key) and a table that says
of each tile whether it is empty, mixed or full. Both are data to it, so both are derived here from
the key intervals at run time, as the project's own kernel does: any block size, anchor and
documents, without recompilation. What remains splash's is the grain: a tile is computed whole.

Rows go one after the other, since a batch would share one table, and compute the tiles of all rows.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import inspect

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_attention.constants import MASKED
from pallas_kernels.block_attention.residuals import KEPT
from pallas_kernels.block_layout import (
    CLEAN,
    BlockLayout,
    KeyIntervals,
    key_intervals,
    one_program,
)

TILE = 512
"""Queries and keys of a tile, forward and backward; short rows take the next multiple of 128."""

LONGEST = 1 << 15  # both ends of a block are packed into 15 bits each
EMPTY, MIXED, FULL = 0, 1, 2  # splash's codes of a tile


def attend_splash(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    layout: BlockLayout,
    *,
    tile: int = TILE,
    interpret: bool = False,
) -> Float[Array, "batch length heads head_dim"]:
    """Softmax attention of tokens to themselves under `allowed(layout, layout)`.

    Args:
      q, k, v: one dtype; heads is a multiple of kv_heads. Scale head_dim**-0.5, scores in fp32.
      layout: as `key_intervals` takes it.
      tile: queries and keys of a tile, a multiple of 128.
      interpret: run on any device, for tests.

    Returns: the shape and dtype of q; zeros where a query has no key. Differentiable in q, k and v.
    Raises: ImportError without tokamax; ValueError for rows beyond 32768 tokens a half, and for
      layouts that `key_intervals` refuses.
    """
    _, half_length = layout.spans[0]
    if half_length > LONGEST:
        raise ValueError(
            f"splash: rows of {half_length} tokens, {LONGEST} at most; use the 'tpu' backend"
        )
    intervals = key_intervals(layout)
    length, tile = q.shape[1], min(tile, -(-q.shape[1] // 128) * 128)
    seen = (intervals.count() > 0)[:, :, None, None]

    def prepare(x):
        """Head-major and a multiple of the tile; zeros where nothing is seen, which may be NaN."""
        x = jnp.where(seen, x, jnp.zeros((), x.dtype))
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -length % tile), (0, 0)))

    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    intervals = _every_query_sees_a_key(intervals, -length % tile)
    clean = next((i * half_length for i, (h, _) in enumerate(layout.spans) if h == CLEAN), length)
    kernel = functools.partial(_attend_row, clean=clean, tile=tile, interpret=interpret)
    rows = prepare(scaled), prepare(k), prepare(v), intervals
    out = jax.lax.map(lambda row: kernel(*row), rows)
    return jnp.where(seen, out.swapaxes(1, 2)[:, :length], jnp.zeros((), q.dtype))


def computed_pairs(intervals: KeyIntervals, keys: int, tile: int = TILE) -> tuple[int, int]:
    """Query-key pairs in the schedule of `attend_splash`, (forward, backward), per query head.

    Summed over the batch. Both passes compute the same tiles. keys: length of the key axis.
    """
    tile = min(tile, -(-keys // 128) * 128)
    pairs = int(_busy(intervals, keys, tile)) * tile**2
    return pairs, pairs


@functools.partial(one_program, static_argnames=("keys", "tile"))
def _busy(intervals: KeyIntervals, keys: int, tile: int) -> Int[Array, ""]:
    """Tiles of the batch that are computed."""
    rows = jax.vmap(lambda row: _tiles(row, keys + -keys % tile, tile))
    return (rows(_every_query_sees_a_key(intervals, -keys % tile)) != EMPTY).sum()


def _attend_row(q, k, v, intervals: KeyIntervals, *, clean: int, tile: int, interpret: bool):
    """One row, head-major."""
    splash, mask_info = _tokamax()
    keys = q.shape[1]
    config = splash.SplashConfig(
        block_q=tile,
        block_kv=tile,
        block_q_dkv=tile,
        block_kv_dkv=tile,
        dq_reduction_steps=3,  # partial gradients of q in 3 buffers, not in one a tile of keys
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    tiles = _tiles(intervals, keys, tile)

    def table(tiles):
        """Splash drops the empty tiles of a table without rows and columns by itself."""
        return mask_info.MaskInfo(
            mask_next=None,
            active_rows=None,
            active_cols=None,
            block_mask=tiles.astype(jnp.int8),
            num_active_blocks=None,
            partial_mask_blocks=None,
            q_sequence=_pack(intervals, clean),
        )

    kernel = splash.SplashAttentionKernel(
        table(tiles),
        table(tiles.T),
        config=config,
        is_mqa=False,
        save_residuals=False,
        mask_value=MASKED,
        mask_function=_Inside(clean),
        fwd_mask_sparsity=0.25,  # for the cost estimate alone
        dkv_mask_sparsity=0.25,
    )
    document = intervals.earlier[0]
    return kernel(q, k, v, splash.SegmentIds(document, document))


def _tokamax():
    """Splash's modules. They are internals of tokamax, which has no public way to give it a mask
    and a table of tiles as data: hence the bound on its version in pyproject.toml."""
    try:
        version = importlib.metadata.version("tokamax")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            "attention backend 'splash' needs tokamax: pip install 'llada2-jax[splash]'"
        ) from error
    try:
        from tokamax._src.ops.experimental.tpu.splash_attention import (
            splash_attention_kernel,
            splash_attention_mask_info,
        )
    except ImportError as error:
        raise _unknown_tokamax(version) from error
    taken = (
        (splash_attention_kernel.SplashConfig, ("dq_reduction_steps", "residual_checkpoint_name")),
        (splash_attention_mask_info.MaskInfo, ("block_mask", "q_sequence", "active_rows")),
    )
    for function, names in taken:
        if not set(names) <= set(inspect.signature(function).parameters):
            raise _unknown_tokamax(version)
    return splash_attention_kernel, splash_attention_mask_info


def _unknown_tokamax(version: str) -> ImportError:
    return ImportError(
        "attention backend 'splash' is written for the internals of tokamax 0.0.17, which "
        f"{version} does not have: pip install 'llada2-jax[splash]', or choose another backend"
    )


def _every_query_sees_a_key(intervals: KeyIntervals, padding: int) -> KeyIntervals:
    """Queries without keys see themselves: splash has no softmax over nothing. `padding` more
    queries come at the end. What they compute is discarded."""

    def pad(run):
        return tuple(jnp.pad(bound, ((0, 0), (0, padding))) for bound in run)

    own, earlier = pad(intervals.own), pad(intervals.earlier)
    index = jnp.arange(own[0].shape[1], dtype=jnp.int32)
    alone = own[0] == own[1]
    own = jnp.where(alone, index, own[0]), jnp.where(alone, index + 1, own[1])
    nowhere = jnp.where(alone, -1, earlier[0]), jnp.where(alone, -1, earlier[1])
    return KeyIntervals(own, nowhere)


def _tiles(intervals: KeyIntervals, keys: int, tile: int) -> Int[Array, "tiles tiles"]:
    """Splash's code of every tile of one row."""
    first = jnp.arange(0, keys, tile, dtype=jnp.int32)

    def overlap(run):
        start, end = run[0][:, None], run[1][:, None]
        return jnp.clip(jnp.minimum(end, first + tile) - jnp.maximum(start, first), 0)

    seen = (overlap(intervals.own) + overlap(intervals.earlier)).reshape(-1, tile, keys // tile)
    return jnp.where((seen == tile).all(1), FULL, jnp.where((seen > 0).any(1), MIXED, EMPTY))


def _pack(intervals: KeyIntervals, clean: int) -> Int[Array, " queries"]:
    """Half, first and last token of every query's block, as one number."""
    start, end = intervals.own
    half = (start >= clean).astype(jnp.int32)
    first, last = start - half * clean, end - 1 - half * clean
    return (half << 30) | (first << 15) | last


@dataclasses.dataclass(frozen=True)
class _Inside:
    """The mask inside a document. Hashable, so that jit knows it again."""

    clean: int

    def __call__(self, packed, key):
        half, first, last = packed >> 30, (packed >> 15) & (LONGEST - 1), packed & (LONGEST - 1)
        in_half = key - half * self.clean
        own = (in_half >= first) & (in_half <= last)
        return own | ((key >= self.clean) & (key - self.clean < first))
