"""Objectives against brute force on a vocabulary small enough to enumerate."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada2_jax.config import NoiseConfig, OptimizerConfig, TrainConfig
from llada2_jax.diffusion import Noised
from llada2_jax.evals.likelihood import left_to_right_nll
from llada2_jax.model import init_params, merge_params
from llada2_jax.objectives import OBJECTIVES
from llada2_jax.objectives.bdlm import noisy_hidden
from llada2_jax.train_step import (
    accumulated,
    init_state,
    make_context,
    make_eval_step,
    make_train_step,
)
from llada2_jax.types import Batch
from pallas_kernels.block_layout import CLEAN, block_index, half_layout
from tests.helpers import TINY, config, make_batch

MASK, LENGTH = 15, 6
TOKENS = np.asarray([[3, 1, 4, 1, 5, 9]])
SEGMENTS = np.asarray([[1, 1, 1, 1, 2, 2]])


@pytest.fixture(scope="module")
def params():
    return init_params(TINY, 1)


def context(block_size, noise=None, **changes):
    cfg = TrainConfig(noise=noise or NoiseConfig(), **changes)
    return make_context(cfg, block_size, MASK)


@functools.partial(jax.jit, static_argnames="block_size")
def token_nll(params, batch, mask, block_size):
    """−log p of every token with the given positions masked."""
    block = block_index(batch.positions, block_size, "document")
    noised = Noised(jnp.where(mask, MASK, batch.tokens), mask, mask, mask.astype(jnp.float32), mask)
    model = merge_params(TINY, params)
    hidden, _ = noisy_hidden(model, batch, noised, block, context(block_size), clean_half=True)
    logp = jax.nn.log_softmax(model.logits(hidden))
    return -jnp.take_along_axis(logp, batch.tokens[..., None], -1)[..., 0]


def with_pairs(batch):
    """Every two documents of a row as a pair."""
    return dataclasses.replace(
        batch,
        preference=jnp.where(batch.segment_ids > 0, 2 * (batch.segment_ids % 2) - 1, 0),
        reference=jnp.zeros(batch.tokens.shape, jnp.float32),
    )


def enumerated_bound(params, block_size):
    """Σ over blocks, sizes k and subsets S of 1/n · 1/C(n,k) · n/k · Σ_{i in S} −log p(x_i)."""
    batch = make_batch(TOKENS, SEGMENTS)
    block = np.asarray(block_index(batch.positions, block_size, "document"))[0]
    blocks = {}
    for i in range(LENGTH):
        blocks.setdefault((SEGMENTS[0, i], block[i]), []).append(i)
    cases = []
    for members in blocks.values():
        n = len(members)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(members, k))
            cases += [(s, 1 / n / len(subsets) * n / k) for s in subsets]
    masks = np.zeros((len(cases), LENGTH), bool)
    for row, (subset, _) in enumerate(cases):
        masks[row, list(subset)] = True
    rows = jax.tree.map(lambda x: jnp.tile(x, (len(cases), 1)), batch)
    nll = np.asarray(token_nll(params, rows, jnp.asarray(masks), block_size))
    return sum(w * nll[r, list(s)].sum() for r, (s, w) in enumerate(cases))


def draws(params, objective, block_size, noise, rows=6000):
    """The objective's value for many documents with the same tokens: independent samples."""
    ids = np.arange(2 * rows).reshape(rows, 2)[:, [0, 0, 0, 0, 1, 1]]
    batch = make_batch(np.tile(TOKENS, (rows, 1)), np.tile(SEGMENTS, (rows, 1)), document_ids=ids)
    output = make_eval_step(TINY, objective)(params, batch, context(block_size, noise))
    return np.asarray(output.nll).sum(1), output


NOISES = {
    "count": NoiseConfig(),
    "independent": NoiseConfig(low_discrepancy=False),
    "sequence": NoiseConfig(group="sequence"),
    "complementary": NoiseConfig(complementary=True),
    "bernoulli": NoiseConfig(draw="bernoulli", t_min=0.0),
    "bernoulli-complementary": NoiseConfig(draw="bernoulli", t_min=0.0, complementary=True),
}


@pytest.mark.parametrize("block_size", [1, 2, 3, 6])
@pytest.mark.parametrize("name", NOISES)
def test_bound_equals_enumeration(params, name, block_size):
    values, _ = draws(params, "bdlm", block_size, NOISES[name])
    error = 5 * values.std() / np.sqrt(len(values))
    assert abs(values.mean() - enumerated_bound(params, block_size)) < error + 1e-4


def test_a_band_of_rates_equals_its_integral(params):
    """t in [a, b], weight (b − a)/t: the integral of the bound's integrand over [a, b]."""
    a, b = 0.3, 0.8
    noise = NoiseConfig(draw="bernoulli", t_min=a, t_max=b)
    values, _ = draws(params, "bdlm", 6, noise, rows=20000)
    batch = make_batch(TOKENS, SEGMENTS)
    masks = np.asarray(list(itertools.product([False, True], repeat=LENGTH)))
    rows = jax.tree.map(lambda x: jnp.tile(x, (len(masks), 1)), batch)
    nll = np.asarray(token_nll(params, rows, jnp.asarray(masks), 6))
    summed = (nll * masks).sum(1)
    t = np.linspace(a, b, 2001)
    k = masks.sum(1)[:, None]
    integrand = (summed[:, None] * t**k * (1 - t) ** (LENGTH - k) / t).sum(0)
    want = np.trapezoid(integrand, t)
    assert abs(values.mean() - want) < 5 * values.std() / np.sqrt(len(values))


def test_bound_at_block_size_one_is_the_left_to_right_likelihood(params):
    batch = make_batch(TOKENS)
    bound = make_eval_step(TINY, "bdlm")(params, batch, context(1)).nll
    chain = left_to_right_nll(TINY, params, batch, MASK)
    np.testing.assert_allclose(bound, chain, atol=1e-5)


def test_a_bound_is_above_the_exact_marginal(params):
    """−log Σ over orders is below the bound at block size L (Jensen); the model is not consistent
    across orders, so the mean over orders of the chain is what the bound equals."""
    batch = make_batch(TOKENS[:, :4])
    orders = list(itertools.permutations(range(4)))
    total = 0.0
    for order in orders:
        mask = np.ones((1, 4), bool)
        for i in order:
            total += float(token_nll(params, batch, jnp.asarray(mask), 4)[0, i])
            mask[0, i] = False
    bound = 0.0
    for k in range(1, 5):
        subsets = list(itertools.combinations(range(4), k))
        for s in subsets:
            mask = np.zeros((1, 4), bool)
            mask[0, list(s)] = True
            nll = token_nll(params, batch, jnp.asarray(mask), 4)[0]
            bound += float(nll[np.asarray(s)].sum()) / k / len(subsets)
    assert bound == pytest.approx(total / len(orders), rel=1e-5)


def test_mdlm_is_bdlm_with_one_block(params):
    batch = make_batch(TOKENS, SEGMENTS)
    pair = [make_eval_step(TINY, o)(params, batch, context(LENGTH)) for o in ("bdlm", "mdlm")]
    np.testing.assert_allclose(pair[0].nll, pair[1].nll, atol=1e-5)


def test_ar_is_the_chain_rule_of_the_logits(params):
    """Against −log softmax of the model's own logits at the next token: of the whole row, and of
    each prefix alone, which cannot see what comes after it."""
    batch, model = make_batch(TOKENS[:, :4]), merge_params(TINY, params)
    got = make_eval_step(TINY, "ar")(params, batch, context(1)).nll

    @jax.jit
    def logp(rows):
        block = block_index(rows.positions, 1, "document")
        layout = half_layout(block, rows.segment_ids, CLEAN)
        return jax.nn.log_softmax(model.logits(model(rows.tokens, rows.positions, layout).hidden))

    whole = np.asarray(logp(batch))[0]
    ids = np.asarray(batch.tokens)[0]
    want = [0.0, *(-whole[i, ids[i + 1]] for i in range(3))]
    np.testing.assert_allclose(np.asarray(got)[0], want, atol=1e-5)
    segments = np.asarray([[i < n for i in range(4)] for n in (1, 2, 3)], int)
    prefixes = np.asarray(logp(make_batch(TOKENS[:, :4].repeat(3, 0) * segments, segments)))
    alone = [0.0, *(-prefixes[n, n, ids[n + 1]] for n in range(3))]
    np.testing.assert_allclose(np.asarray(got)[0], alone, atol=1e-5)


def test_ar_is_the_chain_rule_within_documents(params):
    batch = make_batch(TOKENS, SEGMENTS)
    output = make_eval_step(TINY, "ar")(params, batch, context(1))
    assert float(output.loss.weight) == 4  # two documents' first tokens are not predicted
    first = make_batch(TOKENS[:, :4])
    alone = make_eval_step(TINY, "ar")(params, first, context(1))
    np.testing.assert_allclose(output.nll[:, :4], alone.nll, atol=1e-5)
    assert float(output.nll[0, 0]) == 0 and float(output.nll[0, 4]) == 0


def test_denominator_counts_supervised_tokens_not_masked_ones(params):
    mask = np.ones((1, LENGTH), bool)
    mask[0, :2] = False
    batch = make_batch(TOKENS, SEGMENTS, loss_mask=mask)
    plain = make_eval_step(TINY, "bdlm")(params, batch, context(2))
    pair = make_eval_step(TINY, "bdlm")(params, batch, context(2, NoiseConfig(complementary=True)))
    assert float(plain.loss.weight) == 4 and float(pair.loss.weight) == 8


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_does_not_depend_on_accumulation(params, objective):
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 3, (8, LENGTH)), axis=1)[:, ::-1]
    batch = with_pairs(make_batch(rng.integers(0, 14, (8, LENGTH)), segments))
    cfg = TrainConfig(optimizer=OptimizerConfig())
    state = init_state(cfg.of_step, params)
    gradient = jax.jit(accumulated, static_argnums=(0, 1, 6))
    grads = [
        gradient(objective, TINY, state.params, state.buffers, batch, context(LENGTH), n)[0]
        for n in (1, 4)
    ]
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_train_step_holds_no_logits_of_all_tokens(objective):
    """Every array of the step's program with the vocabulary among its axes is smaller."""
    cfg = config(vocab_size=41)
    batch = with_pairs(make_batch(np.zeros((4, 512), int)))
    state = jax.eval_shape(lambda: init_state(TrainConfig().of_step, init_params(cfg, 0)))
    step = make_train_step(TrainConfig().of_step, cfg, objective)
    program = step.lower(state, batch, context(4)).as_text()
    found = re.findall(r"tensor<(\d+(?:x\d+)*)x\w+>", program)
    shapes = {tuple(map(int, dims.split("x"))) for dims in found}
    sizes = [math.prod(shape) for shape in shapes if cfg.vocab_size in shape]
    assert sizes and max(sizes) < batch.tokens.size * cfg.vocab_size / 4


def test_rate_buckets_share_out_the_loss(params):
    whole = draws(params, "bdlm", 3, NoiseConfig(), rows=64)[1].loss.total
    ids = np.arange(128).reshape(64, 2)[:, [0, 0, 0, 0, 1, 1]]
    batch = make_batch(np.tile(TOKENS, (64, 1)), np.tile(SEGMENTS, (64, 1)), document_ids=ids)
    parts = 0.0
    for low, high in ((0.0, 0.5), (0.5, 1.0)):
        c = dataclasses.replace(context(3), rates=np.asarray([low, high], np.float32))
        parts += float(make_eval_step(TINY, "bdlm")(params, batch, c).loss.total)
    assert parts == pytest.approx(float(whole), rel=1e-5)


def test_padding_is_neither_supervised_nor_seen(params):
    padded = np.concatenate([TOKENS, [[7, 7]]], axis=1)
    segments = np.concatenate([SEGMENTS, [[0, 0]]], axis=1)
    step = make_eval_step(TINY, "bdlm")
    plain = step(params, make_batch(TOKENS, SEGMENTS), context(3))
    with_pad = step(params, make_batch(padded, segments), context(3))
    np.testing.assert_allclose(plain.nll, with_pad.nll[:, :LENGTH], atol=1e-5)
    assert isinstance(make_batch(TOKENS), Batch) and float(with_pad.loss.weight) == LENGTH
