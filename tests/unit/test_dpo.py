"""Preference optimisation against hand derivations and enumeration (§5.3)."""

import dataclasses
import itertools
from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llada2_jax.config import DPOConfig, NoiseConfig, TrainConfig
from llada2_jax.diffusion import Noised, corrupt
from llada2_jax.model import merge_params
from llada2_jax.objectives import OBJECTIVES
from llada2_jax.objectives.bdlm import noisy_hidden
from llada2_jax.objectives.dpo import _draws
from llada2_jax.reference import make_reference_step
from llada2_jax.train_step import accumulated, make_context, make_eval_step
from pallas_kernels.block_layout import block_index
from tests.helpers import ONE_LAYER, make_batch, make_pairs, random_params

MASK, BLOCK, BETA = 15, 4, 0.5
# Texts of several blocks, prompts that end inside one, and pairs of unequal lengths.
PAIRS = [
    (7, [3, 1, 4, 1, 5, 9, 2, 6], [3, 1, 4, 8, 2, 7, 1, 8], 3),
    (9, [2, 7, 1, 8], [2, 7, 3, 5, 8, 9, 7, 9], 1),
    (11, [1, 4, 1, 4], [1, 4, 2, 1], 2),
]


@pytest.fixture(scope="module")
def params():
    return random_params(ONE_LAYER, 1, 0.3)


@pytest.fixture(scope="module")
def others():
    """A reference that differs from the policy."""
    return random_params(ONE_LAYER, 2, 0.3)


def context(noise=None, block_size=BLOCK, **dpo):
    cfg = TrainConfig(noise=noise or NoiseConfig(), dpo=DPOConfig(beta=BETA, **dpo))
    return make_context(cfg, block_size, MASK)


def batch_of(*rows):
    return make_pairs([[PAIRS[i] for i in row] for row in rows], row_length=24)


bounds_of = make_reference_step(ONE_LAYER)
gradient = jax.jit(accumulated, static_argnums=(0, 1, 6))


def referred(params, batch, ctx):
    return dataclasses.replace(batch, reference=bounds_of(params, batch, ctx))


@jax.jit
def naive_bounds(params, batch, ctx):
    """B of each segment of each row, from the logits of all tokens: [rows, segments]."""
    model = merge_params(ONE_LAYER, params)
    block = block_index(batch.positions, ctx.block_size, ctx.block_anchor)
    noised, n = _draws(batch, block, ctx), ctx.dpo.samples
    # The draws of a row are below each other.
    batch, block = jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), (batch, block))
    hidden, _ = noisy_hidden(model, batch, noised, block, ctx, clean_half=True)
    logp = jax.nn.log_softmax(model.logits(hidden))
    logp = jnp.take_along_axis(logp, batch.tokens[..., None], -1)[..., 0]
    inside = jnp.stack([batch.segment_ids == s for s in range(1, 5)])
    bounds = jnp.where(inside, noised.weight * logp, 0.0).sum(-1).T  # [draws, segments]
    return bounds.reshape(-1, n, 4).mean(1)


@jax.jit
@jax.grad
def naive_gradient(params, batch, ctx, push):
    bounds = naive_bounds(params, batch, ctx)
    return -(push * (bounds[:, ::2] - bounds[:, 1::2])).sum()


def test_at_the_reference_the_loss_is_log_2(params):
    batch, ctx = batch_of([0, 2], [1]), context(samples=2)
    output = make_eval_step(ONE_LAYER, "dpo")(params, referred(params, batch, ctx), ctx)
    assert float(output.loss.weight) == 3
    assert float(output.loss.mean()) == pytest.approx(np.log(2), rel=2e-6)
    assert float(output.metrics["reward_margin"].mean()) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("same", [True, False])
def test_gradient_is_the_hand_derived_one(params, others, same):
    """∇ of −log σ(m) is −β σ(−m) (∇B(chosen) − ∇B(rejected)); σ(0) = 1/2 at the reference."""
    ctx = context(samples=2)
    reference = params if same else others
    batch = referred(reference, batch_of([0, 2], [1]), ctx)
    trained, buffers = nnx.split_state(params, nnx.Param, ...)
    got, output = gradient("dpo", ONE_LAYER, trained, buffers, batch, ctx, 1)

    policy = naive_bounds(params, batch, ctx)
    gain = policy - naive_bounds(reference, batch, ctx)
    margins = BETA * (gain[:, ::2] - gain[:, 1::2])  # [rows, pairs]; 0 for the row with one
    push = BETA / (1 + jnp.exp(margins)) * jnp.asarray([[1.0, 1.0], [1.0, 0.0]]) / 3

    want = nnx.split_state(naive_gradient(params, batch, ctx, push), nnx.Param, ...)[0]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6, rtol=1e-3)

    real = np.asarray(margins).reshape(-1)[:3]
    assert float(output.loss.mean()) == pytest.approx(np.log1p(np.exp(-real)).mean(), rel=1e-4)
    means = {name: float(value.mean()) for name, value in output.metrics.items()}
    assert means["reward_margin"] == pytest.approx(real.mean(), abs=1e-4)
    if not same:
        assert means["reward_accuracy"] == pytest.approx((real > 0).mean())
        rewards = BETA * np.asarray(gain).reshape(-1)[:6]
        assert means["reward_chosen"] == pytest.approx(rewards[::2].mean(), abs=1e-4)
        assert means["reward_rejected"] == pytest.approx(rewards[1::2].mean(), abs=1e-4)


TEXT = [3, 1, 4, 1]


def number(masks):
    """Which row of `log_probabilities` each row of masks is."""
    return np.asarray(masks) @ [8, 4, 2, 1]


@pytest.fixture(scope="module")
def log_probabilities(params):
    """fp64 [16, 4]: log p of every token of TEXT under each set of masked ones."""
    masks = jnp.asarray(list(itertools.product([False, True], repeat=len(TEXT))))
    batch, ones = make_batch(np.tile(TEXT, (16, 1))), jnp.ones(masks.shape, jnp.float32)

    @jax.jit
    def of(params):
        noised = Noised(jnp.where(masks, MASK, batch.tokens), masks, masks, ones, ones)
        model, block = merge_params(ONE_LAYER, params), jnp.zeros_like(batch.tokens)
        hidden, _ = noisy_hidden(model, batch, noised, block, context(), clean_half=True)
        logp = jax.nn.log_softmax(model.logits(hidden))
        return jnp.take_along_axis(logp, batch.tokens[..., None], -1)[..., 0]

    return np.asarray(of(params), np.float64)


draws = jax.jit(_draws)

NOISES = {
    "independent": ({}, {"samples": 3}),
    "antithetic": ({}, {"samples": 2, "antithetic": True}),
    "complementary": ({"complementary": True}, {}),
    "bernoulli": ({"draw": "bernoulli", "t_min": 0.0}, {"samples": 2, "antithetic": True}),
}


@pytest.mark.parametrize("name", NOISES)
def test_the_bound_equals_enumeration(log_probabilities, name):
    """B = −Σ over sizes k and subsets S of 1/k · 1/C(n,k) · Σ_{i in S} −log p(x_i | S masked), in
    the mean over draws of the noise; the gradients above have the model's B for a draw."""
    noise, dpo = NOISES[name]
    n, rows = len(TEXT), 6000
    subsets = [s for k in range(1, n + 1) for s in itertools.combinations(range(n), k)]
    want = 0.0
    for subset in subsets:
        row = number([i in subset for i in range(n)])
        want += log_probabilities[row, list(subset)].sum() / len(subset) / comb(n, len(subset))

    ids = np.tile(np.arange(rows)[:, None], (1, n))
    many = make_batch(np.tile(TEXT, (rows, 1)), document_ids=ids)
    noised = draws(many, jnp.zeros((rows, n), jnp.int32), context(NoiseConfig(**noise), **dpo))
    weight = np.asarray(noised.weight, np.float64)
    values = (weight * log_probabilities[number(noised.noise_mask)]).sum(1)
    values = values.reshape(rows, -1).mean(1)
    assert abs(values.mean() - want) < 5 * values.std() / np.sqrt(rows)


def test_gradient_depends_neither_on_packing_nor_on_accumulation(params, others):
    ctx = context(samples=2)
    trained, buffers = nnx.split_state(params, nnx.Param, ...)
    gradients = []
    for rows, n in (([[0, 2], [1]], 1), ([[1, 2], [0]], 1), ([[2, 0], [1]], 2)):
        batch = batch_of(*rows)
        batch = referred(others, batch, ctx)
        gradients.append(gradient("dpo", ONE_LAYER, trained, buffers, batch, ctx, n)[0])
    for other in gradients[1:]:
        for a, b in zip(*map(jax.tree.leaves, (gradients[0], other)), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-4)


def test_both_texts_and_every_visit_share_the_noise(params):
    same = [(5, [3, 1, 4, 1, 5, 9, 2, 6], [3, 1, 4, 1, 5, 9, 2, 6], 3)]
    batch, ctx = make_pairs([same, same]), context()
    batch = dataclasses.replace(batch, visits=batch.visits.at[1].set(4))
    block = block_index(batch.positions, BLOCK, "document")
    mask = np.asarray(draws(batch, block, ctx).noise_mask).reshape(2, 2, 8)
    assert mask.any() and (mask == mask[0, 0]).all()


def test_mirrored_draws_mask_what_was_left_and_one_more():
    n, rows = 8, 64
    batch = make_batch(np.ones((rows, n)), document_ids=np.tile(np.arange(rows)[:, None], (1, n)))
    block, noise = jnp.zeros_like(batch.tokens), NoiseConfig()

    @jax.jit
    def draw(mirrored):
        return corrupt(batch, block, n, noise, mask_id=0, seed=1, mirrored=mirrored)[0].noise_mask

    pair = [np.asarray(draw(mirrored)) for mirrored in (False, True)]
    assert (pair[0].sum(1) + pair[1].sum(1) == n + 1).all()
    assert (pair[0] | pair[1]).all() and (pair[0] & pair[1]).sum() == rows


def test_rows_without_pairs_or_bounds_are_refused(params):
    model, batch = merge_params(ONE_LAYER, params), batch_of([0])
    for field, what in (("preference", "preference pairs"), ("reference", "the reference's")):
        with pytest.raises(ValueError, match=f"hold no {what}"):
            OBJECTIVES["dpo"](model, dataclasses.replace(batch, **{field: None}), context())


def test_a_reference_on_the_host_gives_the_same_bounds(params):
    """And so do micro-batches."""
    batch, ctx = batch_of([0, 2], [1]), context(samples=2)
    near = bounds_of(params, batch, ctx)
    host = jax.tree.map(
        lambda x: jax.device_put(x, x.sharding.with_memory_kind("pinned_host")), params
    )
    far = make_reference_step(ONE_LAYER, 2)(host, batch, ctx)
    np.testing.assert_allclose(near, far, atol=1e-5)
    assert far.sharding.memory_kind == "device"
