"""The rule against a loop that spells it out, and attention to a cache beside the own keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.block_attention import block_attention
from pallas_kernels.block_layout import (
    CLEAN,
    NOISY,
    allowed,
    block_index,
    both_halves,
    concatenate,
    group_bounds,
    half_layout,
    key_intervals,
)

LENGTH = 24


@st.composite
def rows(draw):
    """Segment ids of a row with any documents, one-token ones included, and padding at the end."""
    cuts = sorted(draw(st.sets(st.integers(1, LENGTH - 1), max_size=6)))
    padding = draw(st.integers(0, 5))
    segments = np.searchsorted(cuts, np.arange(LENGTH), side="right") + 1
    segments[LENGTH - padding :] = 0
    starts = np.flatnonzero(np.diff(segments, prepend=-1))
    positions = np.arange(LENGTH) - np.repeat(starts, np.diff(starts, append=LENGTH))
    return jnp.asarray(segments, jnp.int32)[None], jnp.asarray(positions, jnp.int32)[None]


block_sizes = st.sampled_from([1, 3, 4, 8, LENGTH])
anchors = st.sampled_from(["document", "row"])


def spelled_out(block, segment, halves):
    """Equations 3 and 4, case by case."""
    n = len(block)
    mask = np.zeros((n, n), bool)
    for q in range(n):
        for k in range(n):
            if segment[q] != segment[k] or segment[q] == 0:
                continue
            if halves[q] == NOISY and halves[k] == NOISY:
                mask[q, k] = block[q] == block[k]
            if halves[q] == NOISY and halves[k] == CLEAN:
                mask[q, k] = block[q] > block[k]
            if halves[q] == CLEAN and halves[k] == CLEAN:
                mask[q, k] = block[q] >= block[k]
    return mask


@settings(max_examples=25, deadline=None)
@given(rows(), block_sizes, anchors)
def test_rule_is_equation_3(row, size, anchor):
    segment, positions = row
    block = block_index(positions, size, anchor)
    layout = both_halves(block, segment)
    twice = np.tile(np.asarray(block[0]), 2), np.tile(np.asarray(segment[0]), 2)
    halves = [NOISY] * LENGTH + [CLEAN] * LENGTH
    assert np.array_equal(allowed(layout, layout)[0], spelled_out(*twice, halves))


def test_one_clean_half_of_single_tokens_is_causal():
    positions = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    layout = half_layout(block_index(positions, 1, "document"), jnp.ones_like(positions), CLEAN)
    assert np.array_equal(allowed(layout, layout)[0], np.tril(np.ones((LENGTH, LENGTH), bool)))


def test_bounds_are_the_runs_of_a_block_within_its_document():
    segment = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0]])
    block = jnp.asarray([[0, 0, 1, 0, 0, 1, 1, 0]])
    start, end = group_bounds(block, segment)
    assert start.tolist() == [[0, 0, 2, 3, 3, 5, 5, 7]]
    assert end.tolist() == [[2, 2, 3, 5, 5, 7, 7, 8]]


@settings(max_examples=25, deadline=None)
@given(rows(), block_sizes, anchors, st.sampled_from(["noisy", "clean", "both"]))
def test_intervals_are_the_rule(row, size, anchor, halves):
    segment, positions = row
    block = block_index(positions, size, anchor)
    layout = {
        "noisy": half_layout(block, segment, NOISY),
        "clean": half_layout(block, segment, CLEAN),
        "both": both_halves(block, segment),
    }[halves]
    intervals = key_intervals(layout)
    key = jnp.arange(layout.block.shape[1])
    inside = [
        (key >= start[..., None]) & (key < end[..., None])
        for start, end in (intervals.own, intervals.earlier)
    ]
    assert not (inside[0] & inside[1]).any()
    mask = allowed(layout, layout)
    assert np.array_equal(inside[0] | inside[1], mask)
    assert np.array_equal(intervals.count(), mask.sum(-1))


def test_intervals_need_the_same_tokens_in_both_halves():
    part = jnp.zeros((1, 4), jnp.int32)
    layout = concatenate([half_layout(part, part, CLEAN), half_layout(part, part, NOISY)])
    with pytest.raises(ValueError, match="spans"):
        key_intervals(layout)


def test_unknown_anchor_is_named():
    with pytest.raises(ValueError, match="'page'"):
        block_index(jnp.zeros((1, 4), jnp.int32), 2, "page")


def heads(key, length, count):
    return jax.random.normal(key, (1, length, count, 8), jnp.float32)


def test_a_cache_is_one_more_part_of_the_keys():
    positions = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    segment = jnp.ones_like(positions)
    clean = half_layout(block_index(positions, 4, "document"), segment, CLEAN)
    own = half_layout(jnp.full((1, 4), 3, jnp.int32), jnp.ones((1, 4), jnp.int32), NOISY)
    keys = jax.random.split(jax.random.key(0), 5)
    cached = heads(keys[0], LENGTH, 2), heads(keys[1], LENGTH, 2)
    mine = heads(keys[2], 4, 2), heads(keys[3], 4, 2)
    q = heads(keys[4], 4, 4)
    parts = block_attention(q, [(*cached, clean), (*mine, own)], own)
    joined = [jnp.concatenate(pair, axis=1) for pair in zip(cached, mine, strict=True)]
    whole = block_attention(q, [(*joined, concatenate([clean, own]))], own, backend="reference")
    np.testing.assert_allclose(parts, whole, atol=2e-6)


def test_unknown_backend_is_named():
    x = jnp.zeros((1, 1, 1, 8))
    layout = half_layout(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32), CLEAN)
    with pytest.raises(ValueError, match="'cuda'"):
        block_attention(x, [(x, x, layout)], layout, backend="cuda")
