"""The noise: what it depends on, how much it masks, and what its weights estimate."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada2_jax.config import NoiseConfig
from llada2_jax.diffusion import corrupt, embedding_noise
from pallas_kernels.block_layout import block_index
from tests.helpers import make_batch

MASK = 15


def noise(batch, size, anchor="document", **changes):
    block = block_index(batch.positions, size, anchor)
    cfg = NoiseConfig(**changes)
    return corrupt(batch, block, jnp.int32(size), cfg, mask_id=MASK, seed=3)


def many_rows(rows=4000, length=8, **kwargs):
    """The same tokens as so many documents: independent draws of the noise. Their number is the
    same nearly everywhere: operations are compiled once a shape."""
    ids = np.broadcast_to(np.arange(rows)[:, None], (rows, length))
    return make_batch(np.ones((rows, length)), document_ids=ids, **kwargs)


def test_noise_does_not_depend_on_packing():
    first, last = [[1] * 6 + [0] * 2], [[1] * 2 + [2] * 6]
    long = make_batch(np.ones((1, 8)), first, document_ids=[[7] * 6 + [0] * 2])
    packed = make_batch(np.ones((1, 8)), last, document_ids=[[5] * 2 + [7] * 6])
    for size in (1, 2, 3, 6):
        alone, behind = noise(long, size)[0], noise(packed, size)[0]
        assert np.array_equal(alone.noise_mask[0, :6], behind.noise_mask[0, 2:])
        assert np.array_equal(alone.weight[0, :6], behind.weight[0, 2:])


@pytest.mark.parametrize("field", ["document_ids", "visits"])
def test_another_document_or_visit_has_other_noise(field):
    batch = many_rows()
    other = dataclasses.replace(batch, **{field: getattr(batch, field) + 100})
    masks = noise(batch, 4)[0].noise_mask, noise(other, 4)[0].noise_mask
    assert not np.array_equal(*masks)


def test_a_document_split_over_rows_keeps_drawing():
    """Blocks of the second fragment are not those of the first again."""
    batch = many_rows()
    later = dataclasses.replace(batch, document_positions=batch.document_positions + 8)
    assert not np.array_equal(noise(batch, 4)[0].noise_mask, noise(later, 4)[0].noise_mask)


@settings(max_examples=20, deadline=None)
@given(
    size=st.sampled_from([1, 2, 4, 8]),
    group=st.sampled_from(["block", "sequence"]),
    anchor=st.sampled_from(["document", "row"]),
    mask=st.lists(st.booleans(), min_size=8, max_size=8),
    cut=st.integers(1, 8),
    documents=st.lists(st.integers(0, 2), min_size=8, max_size=8).map(sorted),
)
def test_count_draw_masks_at_least_one_token_a_group_and_only_supervised_ones(
    size, group, anchor, mask, cut, documents
):
    """Documents may also change inside a segment, as under data.document_mask=False."""
    segments = np.where(np.arange(8) < cut, 1, 2)[None]
    batch = make_batch(
        [list(range(8))], segments, loss_mask=[mask], document_ids=2 * segments + [documents]
    )
    fragments = make_batch([documents], batch.document_ids)
    batch = dataclasses.replace(
        batch, document_positions=fragments.positions, visits=batch.document_ids % 2
    )
    out = noise(batch, size, anchor, group=group)[0]
    block = np.asarray(block_index(batch.positions, size, anchor))[0]
    groups = {}
    for i in range(8):
        key = (segments[0, i], block[i] if group == "block" else 0)
        groups.setdefault(key, []).append(i)
    for members in groups.values():
        able = [i for i in members if mask[i]]
        hit = [i for i in able if out.noise_mask[0, i]]
        assert bool(hit) == bool(able)
        for i in hit:
            assert out.weight[0, i] == pytest.approx(len(able) / len(hit))
            assert out.tokens[0, i] == MASK
    untouched = ~np.asarray(out.noise_mask[0])
    assert np.array_equal(np.asarray(out.tokens)[0, untouched], np.arange(8)[untouched])
    assert not (np.asarray(out.noise_mask[0]) & ~np.asarray(mask)).any()


def test_block_size_one_masks_everything_with_weight_one():
    out = noise(many_rows(), 1)[0]
    assert out.noise_mask.all() and (np.asarray(out.weight) == 1).all()


@pytest.mark.parametrize("low_discrepancy", [True, False])
def test_every_number_of_masks_is_as_likely(low_discrepancy):
    out = noise(many_rows(), 4, low_discrepancy=low_discrepancy)[0]
    counts = np.asarray(out.noise_mask).reshape(-1, 4).sum(1)
    share = np.bincount(counts, minlength=5) / len(counts)
    assert share[0] == 0
    np.testing.assert_allclose(share[1:], 0.25, atol=0.025)


def test_low_discrepancy_spreads_the_rates_of_a_document():
    """8 consecutive blocks of one document: no quarter of the rates is left out."""
    rates = np.asarray(noise(many_rows(), 1, draw="bernoulli", t_min=0.0)[0].rate)
    quarters = np.stack([(rates >= q / 4) & (rates < (q + 1) / 4) for q in range(4)]).sum(-1)
    assert quarters.min() >= 1 and quarters.max() <= 3


@pytest.mark.parametrize("draw", ["count", "bernoulli"])
def test_complementary_members_partition_the_supervised_tokens(draw):
    loss_mask = np.ones((4000, 8), bool)
    loss_mask[:, :2] = False
    batch = many_rows(loss_mask=loss_mask)
    first, second = noise(batch, 4, draw=draw, complementary=True)
    assert np.array_equal(first.noise_mask ^ second.noise_mask, loss_mask)
    assert not (first.noise_mask & second.noise_mask).any()


@pytest.mark.parametrize("group", ["block", "sequence"])
@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("draw", ["count", "bernoulli"])
def test_weights_are_unbiased_for_a_cost_of_one_a_token(draw, complementary, group):
    """E[weight · masked] is 1 for every token (t_max − t_min for the bernoulli range)."""
    t_min, t_max = (0.2, 0.7) if draw == "bernoulli" else (NoiseConfig.t_min, 1.0)
    want = t_max - t_min if draw == "bernoulli" else 1.0
    members = noise(
        many_rows(),
        4,
        draw=draw,
        complementary=complementary,
        group=group,
        t_min=t_min,
        t_max=t_max,
    )
    for out in members:
        weight = np.asarray(out.weight)
        error = weight.std(0) / np.sqrt(len(weight))
        assert (np.abs(weight.mean(0) - want) < 5 * error + 1e-6).all()


def test_flat_weights_are_one():
    out = noise(many_rows(), 4, weight="flat")[0]
    assert set(np.unique(np.asarray(out.weight)[np.asarray(out.noise_mask)])) == {1.0}


def test_embedding_noise_only_where_masked_and_only_while_on():
    batch = many_rows()
    mask = noise(batch, 4)[0].noise_mask
    drawn = np.asarray(embedding_noise(batch, mask, 16, jnp.float32(0.5), 0))
    assert not drawn[~np.asarray(mask)].any()
    assert drawn[np.asarray(mask)].std() == pytest.approx(0.5, rel=0.02)
    assert not np.asarray(embedding_noise(batch, mask, 16, jnp.float32(0.0), 0)).any()
