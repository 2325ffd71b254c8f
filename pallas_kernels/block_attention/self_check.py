"""The proof that "auto" asks of a training kernel: what will run, on the device where it will.

The kernel is compiled and run forward and backward at the very shapes of the call: its masked and
unmasked steps, its strips of long rows, its memory. The oracle, which is quadratic, computes some
of the queries only, spread over the row; only they have a cotangent, so that it knows all
gradients of keys and values too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_attention.reference import attend_reference
from pallas_kernels.block_layout import (
    CLEAN,
    BlockLayout,
    block_index,
    concatenate,
    half_layout,
    zigzag,
)
from pallas_kernels.selection import difference, first_proven

PREFERENCES = {"tpu": ("tpu", "splash"), "gpu": ("mosaic", "triton")}
"""Kernels to try on a platform, best first."""

SCORES = 1 << 24
"""Scores that the oracle holds at once, which decides how many queries it computes."""

BLOCK_SIZE = 32

NAMES = ("output", "dq", "dk", "dv")

Attend = Callable[..., jax.Array]
Spans = tuple[tuple[int, int], ...]


def select(attend: Callable[..., jax.Array], q, k, layout: BlockLayout) -> str:
    """The backend for arrays like q and k (only shapes and dtypes are read) and layouts of these
    spans, proven once for each.

    Args:
      attend: called with (q, k, v, layout, backend=candidate), and where there are fewer queries
        than keys also with queries= and at=, as `block_attention` takes them.
      layout: of the keys.
    """
    shapes = q.shape, k.shape, jnp.dtype(q.dtype), layout.spans

    def prove(backend: str, device) -> str | None:
        return self_check(functools.partial(attend, backend=backend), device, *shapes)

    where = "q {}, k {}, {}, spans {}".format(*shapes)
    return first_proven("attention backend", PREFERENCES, prove, where)


def self_check(attend: Attend, device, q_shape, k_shape, dtype, spans: Spans) -> str | None:
    """What is wrong with `attend` on the device, forward or backward, or None.

    Over rows of one document, and over rows of documents that straddle tiles and blocks, with
    padding; one program. Raises what compiling or running raises.
    """
    sampled = sampled_queries(q_shape, k_shape)
    at = None
    if q_shape[1] != k_shape[1]:
        at = zigzag(spans, k_shape[1] // q_shape[1])[0].astype(np.int32)
    tokens = sampled if at is None else at[sampled]
    run = _output_and_gradients(attend, at)
    with jax.default_device(device):
        inputs = _inputs(q_shape, k_shape, dtype, sampled)
        for documents in ([], [1, 129, 171, spans[0][1] // 3]):
            layout = rows_of(documents, q_shape[0], spans)
            actual = _at(sampled, *run(layout, *inputs))
            with jax.default_matmul_precision("highest"):
                expected = _expected(
                    tuple(sampled.tolist()), tuple(tokens.tolist()), layout, *inputs
                )
            if fault := difference(NAMES, actual, expected):
                return fault
    return None


def sampled_queries(q_shape, k_shape):
    """Indices of the queries that the oracle computes, from the first to the last."""
    _, queries, heads, _ = q_shape
    group = heads // k_shape[2]
    number = np.clip(SCORES // (group * k_shape[1]), 2, queries)
    return np.unique(np.linspace(0, queries - 1, number).astype(np.int32))


def rows_of(documents: list[int], batch: int, spans: Spans) -> BlockLayout:
    """Rows of these documents and one that fills the rest, with padding behind documents.

    A noisy half alone is MDLM's, one block a document: small blocks would be a diagonal, without a
    step that takes no mask.
    """
    length = spans[0][1]
    block_size = BLOCK_SIZE if any(half == CLEAN for half, _ in spans) else length
    padding = min(19, length // 8) if documents else 0
    ends = np.minimum(np.cumsum([*documents, length]), length - padding)
    index = np.arange(length)
    document = (index[:, None] >= ends).sum(1)
    starts = np.concatenate([[0], ends])
    positions = (index - starts[document])[None].repeat(batch, 0).astype(np.int32)
    segment = np.where(document < len(ends), document + 1, 0)[None].repeat(batch, 0)
    block = block_index(positions, block_size, "document")
    halves = [half_layout(block, jnp.asarray(segment, jnp.int32), half) for half, _ in spans]
    return concatenate(halves)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _random(q_shape, k_shape, dtype):
    """q, k, v and a cotangent, of variance 1."""
    shapes = (q_shape, k_shape, k_shape, q_shape)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def _inputs(q_shape, k_shape, dtype, sampled):
    q, k, v, cotangent = _random(q_shape, k_shape, dtype)
    only = np.isin(np.arange(q_shape[1]), sampled)[:, None, None]
    return q, k, v, jnp.where(only, cotangent, jnp.zeros((), dtype))


def _tokens_of(layout: BlockLayout, index: np.ndarray) -> BlockLayout:
    """The layout of some tokens, those of a half together."""
    ends = np.cumsum([n for _, n in layout.spans])
    counts = np.bincount(np.searchsorted(ends, index, side="right"), minlength=len(ends))
    spans = tuple((half, int(n)) for (half, _), n in zip(layout.spans, counts, strict=True))
    return BlockLayout(layout.block[:, index], layout.segment[:, index], spans)


def _output_and_gradients(attend: Attend, at: np.ndarray | None):
    def run(layout, q, k, v, cotangent):
        some = {} if at is None else {"queries": _tokens_of(layout, at), "at": jnp.asarray(at)}
        output, pull = jax.vjp(lambda q, k, v: attend(q, k, v, layout, **some), q, k, v)
        return output, *pull(cotangent)

    return jax.jit(run)


@jax.jit
def _at(sampled, output, d_q, d_k, d_v):
    """What the oracle knows, and of the other queries whether they are numbers."""
    lost = jnp.where(jnp.isfinite(output).all() & jnp.isfinite(d_q).all(), 0.0, jnp.nan)
    rows = output[:, sampled].astype(jnp.float32) + lost
    return rows, d_q[:, sampled], d_k, d_v


@functools.partial(jax.jit, static_argnums=(0, 1))
def _expected(sampled, tokens, layout: BlockLayout, q, k, v, cotangent):
    """The oracle of the sampled queries, which are these tokens, a row and a key head at a time."""
    index = np.asarray(sampled)
    queries = _tokens_of(layout, np.asarray(tokens))

    def by_head(x):
        """[batch, n, heads, head_dim] -> [batch, kv_heads, n, group, head_dim]."""
        batch, n, _, head_dim = x.shape
        return x.reshape(batch, n, k.shape[2], -1, head_dim).swapaxes(1, 2)

    def one_head(queries, keys, arrays):
        q, k, v, cotangent = (x[None].astype(jnp.float32) for x in arrays)
        attend = functools.partial(attend_reference, queries=queries, keys=keys)
        output, pull = jax.vjp(attend, q, k, v)
        return [x[0] for x in (output, *pull(cotangent))]

    def one_row(row):
        queries, keys = jax.tree.map(lambda x: x[None], row[:2])
        return jax.lax.map(functools.partial(one_head, queries, keys), row[2:])

    arrays = (by_head(x) for x in (q[:, index], k, v, cotangent[:, index]))
    results = jax.lax.map(one_row, (queries, layout, *arrays))
    return [x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1, x.shape[4]) for x in results]
