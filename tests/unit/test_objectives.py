"""Objectives against brute force on a vocabulary small enough to enumerate."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llada2_jax.config import NoiseConfig, TrainConfig
from llada2_jax.diffusion import Noised
from llada2_jax.evals.likelihood import left_to_right_nll
from llada2_jax.model import merge_params
from llada2_jax.objectives import OBJECTIVES
from llada2_jax.objectives.bdlm import draw_noise, noisy_hidden
from llada2_jax.train_step import (
    abstract_state,
    accumulated,
    make_context,
    make_eval_step,
    make_train_step,
)
from pallas_kernels.block_layout import CLEAN, block_index, half_layout
from tests.helpers import ONE_LAYER, TINY, make_batch, random_params
from tests.jaxprs import equations_of

MASK, LENGTH = 15, 6
TOKENS = np.asarray([[3, 1, 4, 1, 5, 9]])
SEGMENTS = np.asarray([[1, 1, 1, 1, 2, 2]])
# Every set of masked positions; most tests have a row for each, and so the same programs.
SETS = np.asarray(list(itertools.product([False, True], repeat=LENGTH)))


@pytest.fixture(scope="module")
def params():
    return random_params(TINY, 1, 0.3)


def context(block_size, noise=None, **changes):
    cfg = TrainConfig(noise=noise or NoiseConfig(), **changes)
    return make_context(cfg, block_size, MASK)


def rows_of(tokens, segments, count=64):
    """The same row as so many documents of their own: independent draws of the noise."""
    ids = 2 * np.arange(count)[:, None] + segments
    return make_batch(np.tile(tokens, (count, 1)), np.tile(segments, (count, 1)), document_ids=ids)


@jax.jit
def token_nll(params, batch, mask, ctx):
    """−log p of every token with the given positions masked."""
    block = block_index(batch.positions, ctx.block_size, "document")
    noised = Noised(jnp.where(mask, MASK, batch.tokens), mask, mask, mask.astype(jnp.float32), mask)
    model = merge_params(TINY, params)
    hidden, _ = noisy_hidden(model, batch, noised, block, ctx, clean_half=True)
    logp = jax.nn.log_softmax(model.logits(hidden))
    return -jnp.take_along_axis(logp, batch.tokens[..., None], -1)[..., 0]


def nll_by_set(params, block_size, segments=SEGMENTS):
    """fp64 [64, 6]: −log p of every token under each of SETS."""
    nll = token_nll(params, rows_of(TOKENS, segments), SETS, context(block_size))
    return np.asarray(nll, np.float64)


def number(masks):
    """Which of SETS each row of masks is."""
    return np.asarray(masks) @ (1 << np.arange(LENGTH))[::-1]


def weighted(nll, drawn):
    """fp64 [rows, 6]: Σ weight · −log p as the nll of each set of masks has it, a mean over the
    members of complementary pairs."""
    weights = np.asarray(drawn.masked * drawn.noised.weight, np.float64)
    values = weights * nll[number(drawn.noised.noise_mask)]
    return values.reshape(drawn.members, -1, LENGTH).mean(0)


def with_pairs(batch):
    """Every two documents of a row as a pair."""
    return dataclasses.replace(
        batch,
        preference=jnp.where(batch.segment_ids > 0, 2 * (batch.segment_ids % 2) - 1, 0),
        reference=jnp.zeros(batch.tokens.shape, jnp.float32),
    )


def enumerated_bound(nll, block_size):
    """Σ over blocks, sizes k and subsets S of 1/n · 1/C(n,k) · n/k · Σ_{i in S} −log p(x_i)."""
    positions = make_batch(TOKENS, SEGMENTS).positions
    block = np.asarray(block_index(positions, block_size, "document"))[0]
    blocks = {}
    for i in range(LENGTH):
        blocks.setdefault((SEGMENTS[0, i], block[i]), []).append(i)
    total = 0.0
    for members in blocks.values():
        for k in range(1, len(members) + 1):
            for subset in itertools.combinations(members, k):
                row = number([i in subset for i in range(LENGTH)])
                total += nll[row, list(subset)].sum() / k / math.comb(len(members), k)
    return total


NOISES = {
    "count": NoiseConfig(),
    "independent": NoiseConfig(low_discrepancy=False),
    "sequence": NoiseConfig(group="sequence"),
    "complementary": NoiseConfig(complementary=True),
    "bernoulli": NoiseConfig(draw="bernoulli", t_min=0.0),
    "bernoulli-complementary": NoiseConfig(draw="bernoulli", t_min=0.0, complementary=True),
}

draws = jax.jit(draw_noise)


@pytest.mark.parametrize("block_size", [1, 2, 3, 6])
@pytest.mark.parametrize("name", NOISES)
def test_bound_equals_enumeration(params, name, block_size):
    """In the mean over draws of the noise; the next test has the objective of each draw."""
    nll = nll_by_set(params, block_size)
    drawn = draws(rows_of(TOKENS, SEGMENTS, 6000), context(block_size, NOISES[name]))
    values = weighted(nll, drawn).sum(1)
    error = 5 * values.std() / np.sqrt(len(values))
    assert abs(values.mean() - enumerated_bound(nll, block_size)) < error + 1e-4


@pytest.mark.parametrize("block_size", [1, 2, 3, 6])
@pytest.mark.parametrize("name", ["count", "bernoulli-complementary"])
def test_the_objective_is_the_weighted_loss_of_its_draw(params, name, block_size):
    batch, ctx = rows_of(TOKENS, SEGMENTS), context(block_size, NOISES[name])
    drawn = draws(batch, ctx)
    output = make_eval_step(TINY, "bdlm")(params, batch, ctx)
    want = weighted(nll_by_set(params, block_size), drawn)
    np.testing.assert_allclose(output.nll, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(output.loss.total, want.sum() * drawn.members, rtol=1e-5)


def test_bound_at_block_size_one_is_the_left_to_right_likelihood(params):
    batch = rows_of(TOKENS, np.ones_like(SEGMENTS))
    bound = make_eval_step(TINY, "bdlm")(params, batch, context(1)).nll
    chain = jax.jit(functools.partial(left_to_right_nll, TINY))(params, batch, MASK)
    np.testing.assert_allclose(bound, chain, atol=1e-5)


def test_a_bound_is_above_the_exact_marginal(params):
    """−log Σ over orders is below the bound at block size L (Jensen); the model is not consistent
    across orders, so the mean over orders of the chain is what the bound equals."""
    nll = nll_by_set(params, LENGTH, np.ones_like(SEGMENTS))
    orders = list(itertools.permutations(range(LENGTH)))
    total = 0.0
    for order in orders:
        mask = np.ones(LENGTH, bool)
        for i in order:
            total += nll[number(mask), i]
            mask[i] = False
    subsets = [s for k in range(1, LENGTH + 1) for s in itertools.combinations(range(LENGTH), k)]
    bound = 0.0
    for s in subsets:
        row = number([i in s for i in range(LENGTH)])
        bound += nll[row, list(s)].sum() / len(s) / math.comb(LENGTH, len(s))
    assert bound == pytest.approx(total / len(orders), rel=1e-5)


def test_mdlm_is_bdlm_with_one_block(params):
    batch = rows_of(TOKENS, SEGMENTS)
    pair = [make_eval_step(TINY, o)(params, batch, context(LENGTH)) for o in ("bdlm", "mdlm")]
    np.testing.assert_allclose(pair[0].nll, pair[1].nll, atol=1e-5)


def test_ar_is_the_chain_rule_of_the_logits(params):
    """Against −log softmax of the model's own logits at the next token: of the whole row, and of
    each prefix alone, which cannot see what comes after it. Documents are chains of their own."""
    prefixes = np.arange(LENGTH) < np.arange(1, LENGTH + 1)[:, None]  # row n − 1 has n tokens
    segments = np.concatenate([SEGMENTS, prefixes]).astype(int)
    batch, model = make_batch(TOKENS * (segments > 0), segments), merge_params(TINY, params)
    step = make_eval_step(TINY, "ar")
    documents, *_, whole = np.asarray(step(params, batch, context(1)).nll)

    @jax.jit
    def logp(rows):
        block = block_index(rows.positions, 1, "document")
        layout = half_layout(block, rows.segment_ids, CLEAN)
        return jax.nn.log_softmax(model.logits(model(rows.tokens, rows.positions, layout).hidden))

    ids = TOKENS[0]
    prefixes = np.asarray(logp(batch))[1:]
    want = [0.0, *(-prefixes[-1, i, ids[i + 1]] for i in range(LENGTH - 1))]
    np.testing.assert_allclose(whole, want, atol=1e-5)
    alone = [0.0, *(-prefixes[i, i, ids[i + 1]] for i in range(LENGTH - 1))]
    np.testing.assert_allclose(whole, alone, atol=1e-5)
    np.testing.assert_allclose(documents[:4], whole[:4], atol=1e-5)
    assert documents[0] == documents[4] == 0 and documents[5] not in (0, whole[5])
    # Two documents' first tokens are not predicted.
    first = dataclasses.replace(batch, loss_mask=batch.loss_mask & (np.arange(7) == 0)[:, None])
    assert float(step(params, first, context(1)).loss.weight) == 4


def test_denominator_counts_supervised_tokens_not_masked_ones(params):
    """tests/unit/test_posttraining.py has it of complementary pairs, and of loss weights."""
    batch = rows_of(TOKENS, SEGMENTS)
    batch = dataclasses.replace(batch, loss_mask=batch.loss_mask & (np.arange(LENGTH) > 1))
    output = make_eval_step(TINY, "bdlm")(params, batch, context(2))
    assert float(output.loss.weight) == 4 * len(SETS)
    assert float(output.metrics["mask_rate"].total) < 4 * len(SETS)


@pytest.mark.parametrize("objective", ["ar", "bdlm"])
def test_gradient_does_not_depend_on_accumulation(objective):
    """tests/unit/test_posttraining.py has it of CAP, and test_dpo.py of DPO; MDLM is BDLM with one
    block a document (test_mdlm_is_bdlm_with_one_block)."""
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 3, (8, LENGTH)), axis=1)[:, ::-1]
    batch = make_batch(rng.integers(0, 14, (8, LENGTH)), segments)
    trained, buffers = nnx.split_state(random_params(ONE_LAYER, 1, 0.3), nnx.Param, ...)
    gradient = jax.jit(accumulated, static_argnums=(0, 1, 6))
    inputs = objective, ONE_LAYER, trained, buffers, batch, context(LENGTH)
    grads = [gradient(*inputs, n)[0] for n in (1, 4)]
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_train_step_holds_no_logits_of_all_tokens(objective):
    """Every array of the step's program with the vocabulary among its axes is smaller."""
    cfg = dataclasses.replace(ONE_LAYER, vocab_size=41)
    batch = with_pairs(make_batch(np.zeros((4, 512), int)))
    state = abstract_state(TrainConfig().of_step, cfg)
    step = make_train_step(TrainConfig().of_step, cfg, objective)
    program = step.trace(state, batch, context(4)).jaxpr
    arrays = (array.aval for equation in equations_of(program.jaxpr) for array in equation.outvars)
    sizes = [x.size for x in arrays if cfg.vocab_size in getattr(x, "shape", ())]
    assert sizes and max(sizes) < batch.tokens.size * cfg.vocab_size / 4


def test_rate_buckets_share_out_the_loss(params):
    batch, step = rows_of(TOKENS, SEGMENTS), make_eval_step(TINY, "bdlm")
    whole = step(params, batch, context(3)).loss.total
    parts = 0.0
    for low, high in ((0.0, 0.5), (0.5, 1.0)):
        c = dataclasses.replace(context(3), rates=np.asarray([low, high], np.float32))
        part = float(step(params, batch, c).loss.total)
        assert 0 < part < whole
        parts += part
    assert parts == pytest.approx(float(whole), rel=1e-5)


def test_padding_is_neither_supervised_nor_seen(params):
    """Whatever stands there."""
    step, segments = make_eval_step(TINY, "bdlm"), SEGMENTS % 2  # the second document's place
    outputs = [
        step(params, rows_of(TOKENS * segments + filler * (1 - segments), segments), context(3))
        for filler in (7, 11)
    ]
    whole = step(params, rows_of(TOKENS, SEGMENTS), context(3))
    for output in outputs:
        np.testing.assert_allclose(output.nll[:, :4], whole.nll[:, :4], atol=1e-5)
        assert not np.asarray(output.nll[:, 4:]).any()
        assert float(output.loss.weight) == 4 * len(SETS)
