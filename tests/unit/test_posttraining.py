"""Supervised fine-tuning and CAP: targets by enumeration, what is supervised, gradients."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llada2_jax.config import CapConfig, NoiseConfig, TrainConfig
from llada2_jax.data.best_fit import BestFitRows
from llada2_jax.data.loader import to_batch
from llada2_jax.diffusion import Noised, corrupt, replace_visible
from llada2_jax.model import merge_params
from llada2_jax.objectives import whole_batch_context
from llada2_jax.objectives.bdlm import draw_noise, noisy_hidden
from llada2_jax.train_step import accumulated, make_context, make_eval_step
from pallas_kernels.block_layout import block_index
from tests.helpers import ONE_LAYER, make_batch, random_params

MASK, EOS, BLOCK = 15, 14, 3
TOKENS = [3, 1, 4, 1, 5, 9]
ANSWER = [False, False, True, True, True, True]  # two tokens of prompt, and blocks of 1 and 3
BAND = {"draw": "bernoulli", "t_min": 0.3, "t_max": 0.8}


@pytest.fixture(scope="module")
def params():
    return random_params(ONE_LAYER, 1, 0.3)


def context(block_size=BLOCK, noise=None, **changes):
    return make_context(TrainConfig(noise=noise or NoiseConfig(), **changes), block_size, MASK)


def answers(count):
    """One prompt and answer as so many documents: independent draws of the noise."""
    ids = np.tile(np.arange(count)[:, None], (1, len(TOKENS)))
    tokens, mask = ([list(x)] * count for x in (TOKENS, ANSWER))
    return make_batch(tokens, loss_mask=mask, document_ids=ids)


@pytest.fixture(scope="module")
def nll_by_mask(params):
    """fp64 [16, 6]: −log p of every token under each set of masked answer tokens, by its number in
    binary."""
    masks = np.zeros((16, len(TOKENS)), bool)
    masks[:, np.flatnonzero(ANSWER)] = list(itertools.product([False, True], repeat=4))
    return nll_of(params, answers(16), np.where(masks, MASK, TOKENS))


def nll_of(params, batch, noisy):
    """fp64 [16, 6]: −log p of every token, given the noisy ones."""
    return np.asarray(_nll(params, batch, noisy), np.float64)


@jax.jit
def _nll(params, batch, noisy):
    model, mask = merge_params(ONE_LAYER, params), noisy == MASK
    noised = Noised(noisy, mask, mask, mask.astype(float), mask)
    block = block_index(batch.positions, BLOCK, "document")
    hidden, _ = noisy_hidden(model, batch, noised, block, context(), clean_half=True)
    logp = jax.nn.log_softmax(model.logits(hidden))
    return -jnp.take_along_axis(logp, batch.tokens[..., None], -1)[..., 0]


def number(masks) -> np.ndarray:
    return np.asarray(masks)[:, np.flatnonzero(ANSWER)] @ np.asarray([8, 4, 2, 1])


def coefficient(noise: NoiseConfig, n: int, k: int) -> float:
    """Weight times probability of one set of k masks among n, as the docstring's targets say."""
    elbo = noise.weight == "elbo"
    if noise.draw == "count":
        sizes = n + 1 if noise.complementary else n
        return (sizes / k if elbo else 1.0) / sizes / math.comb(n, k)
    bands = [(noise.t_min, noise.t_max)]
    if noise.complementary:
        bands.append((1 - noise.t_max, 1 - noise.t_min))
    values = []
    for low, high in bands:
        t = np.linspace(low, high, 4001)
        density = 1 / t if elbo else np.full_like(t, 1 / (high - low))
        values.append(np.trapezoid(density * t**k * (1 - t) ** (n - k), t))
    return float(np.mean(values))


def enumerated(noise: NoiseConfig, nll_by_mask: np.ndarray) -> float:
    total, answer = 0.0, np.flatnonzero(ANSWER)
    for block in (answer[:1], answer[1:]):
        for k in range(1, len(block) + 1):
            for chosen in itertools.combinations(block, k):
                row = number([[i in chosen for i in range(len(TOKENS))]])[0]
                total += coefficient(noise, len(block), k) * nll_by_mask[row, list(chosen)].sum()
    return total


TARGETS = [
    {**draw, "weight": weight, "complementary": complementary, "group": group}
    for draw in (BAND, {"draw": "count"})
    for weight in ("elbo", "flat")
    for complementary in (False, True)
    for group in ("block", "sequence")
    if (draw, weight, group) != ({"draw": "count"}, "flat", "sequence")  # not the same by block
]


@pytest.mark.parametrize("noise", TARGETS, ids=lambda n: "-".join(map(str, n.values())))
def test_targets_equal_enumeration(nll_by_mask, noise):
    """Mean over both members of a pair, in units of the whole document."""
    noise, count = NoiseConfig(**noise), 60_000
    draw = draw_noise(answers(count), context(noise=noise))
    assert float(draw.supervised.sum()) == draw.members * 4 * count
    weights = np.asarray(draw.masked * draw.noised.weight, np.float64)
    values = (weights * nll_by_mask[number(draw.noised.noise_mask)]).sum(1)
    values = values.reshape(draw.members, count).mean(0)
    error = 5 * values.std() / np.sqrt(count)
    assert error < 0.2 and abs(values.mean() - enumerated(noise, nll_by_mask)) < error


# -------------------------------------------------------------------------- what is supervised


@dataclasses.dataclass(frozen=True)
class Chats:
    """Documents of (tokens, loss weights)."""

    texts: tuple
    weighted = True
    paired = False

    @property
    def ids(self):
        return np.arange(7, 7 + len(self.texts), dtype=np.int32)

    @property
    def lengths(self):
        return np.asarray([len(tokens) for tokens, _ in self.texts])

    @property
    def chosen(self):
        return np.zeros(len(self.texts), np.int64)

    @property
    def first_supervised(self):
        return np.asarray([np.flatnonzero(weights)[0] for _, weights in self.texts])

    @property
    def supervised_end(self):
        return np.asarray([np.flatnonzero(weights)[-1] + 1 for _, weights in self.texts])

    def read(self, document, start, stop):
        tokens, weights = self.texts[document]
        return np.asarray(tokens[start:stop], np.int32), np.asarray(weights[start:stop], np.float32)


def chats(count=9, turns=2) -> Chats:
    """Random conversations of 5 to 17 tokens, each ending in an answer with EOS."""
    rng, texts = np.random.default_rng(0), []
    for _ in range(count):
        weights = []
        for _ in range(turns):
            weights += [0.0] * rng.integers(1, 4) + [rng.choice([0.5, 1.0])] * rng.integers(1, 5)
        weights.append(weights[-1])
        texts.append(([*rng.integers(0, EOS, len(weights) - 1), EOS], weights))
    return Chats(tuple(texts))


def packed(documents: Chats, row_length: int, multiple: int = 4):
    """All the documents in rows."""
    rows = BestFitRows(documents, row_length, 99, 0, EOS, multiple, shuffle=False, weighted=True)
    fields = [rows[i] for i in range(rows.epoch_rows)]
    return to_batch({name: np.stack([f[name] for f in fields]) for name in fields[0]})


@pytest.mark.parametrize("noise", [{"draw": "count"}, {**BAND, "group": "sequence"}])
def test_every_answer_token_is_supervised_once_a_pair(noise):
    batch = packed(chats(), 32)
    draw = draw_noise(batch, context(4, NoiseConfig(**noise, complementary=True)))
    first, second = np.asarray(draw.masked).reshape(2, *batch.tokens.shape)
    np.testing.assert_array_equal(first + second, batch.loss_weights)
    assert not (first * second).any() and first.any() and second.any()
    given = np.tile(batch.loss_mask, (2, 1))
    assert (np.asarray(draw.noised.tokens) == np.tile(batch.tokens, (2, 1)))[~given].all()


def test_eos_is_supervised_to_the_end_of_the_last_block_and_no_further():
    """Unless a document fills the row, which is dFactory's way."""
    chat = Chats((([1, 2, 3, 4, EOS], [0.0, 0.0, 1.0, 1.0, 1.0]),))
    noise = NoiseConfig(complementary=True)
    for multiple, end in ((4, 8), (16, 16)):
        batch = packed(chat, 16, multiple)
        draw = draw_noise(batch, context(4, noise))
        supervised = np.flatnonzero(np.asarray(draw.supervised)[0])
        np.testing.assert_array_equal(supervised, np.arange(2, end))
        assert (batch.tokens[0, 4:] == EOS).all()
        np.testing.assert_array_equal(batch.segment_ids[0], np.arange(16) < end)


def test_hidden_turns():
    """After the first turn of a block everything is masked and nothing supervised."""
    loss_mask = [0, 1, 1, 0, 0, 1, 1, 1] + [1, 1, 0, 0, 1, 0, 0, 0] + [0, 0, 0, 0, 0, 0, 1, 1]
    want = [0, 1, 1, 0, 0, 0, 0, 0] + [1, 1, 0, 0, 0, 0, 0, 0] + [0, 0, 0, 0, 0, 0, 1, 1]
    hidden = [0, 0, 0, 1, 1, 1, 1, 1] + [0, 0, 1, 1, 1, 1, 1, 1] + [0] * 8
    # A second document in the row, whose first block would go on with the first one's; padding.
    segments = [1] * 24 + [2] * 4 + [0] * 4
    loss_mask, want, hidden = loss_mask + [1] * 8, want + [1] * 4 + [0] * 4, hidden + [0] * 8
    tokens = np.arange(32)[None] % MASK
    batch = make_batch(tokens, [segments], loss_mask=[loss_mask])
    for group, anchor in itertools.product(("block", "sequence"), ("document", "row")):
        noise = NoiseConfig(later_turns="hide", complementary=True, group=group)
        block = block_index(batch.positions, 8, anchor)
        pair = corrupt(batch, block, jnp.int32(8), noise, mask_id=MASK, seed=0)
        drawn = [np.asarray(m.weight)[0] > 0 for m in pair]
        np.testing.assert_array_equal(drawn[0] ^ drawn[1], np.asarray(want, bool))
        for member, weighted in zip(pair, drawn, strict=True):
            np.testing.assert_array_equal(member.supervised[0], want)
            np.testing.assert_array_equal(member.noise_mask[0], weighted | np.asarray(hidden, bool))
            np.testing.assert_array_equal(member.tokens[0] == MASK, member.noise_mask[0])


# ------------------------------------------------------------------------------- the objectives


def test_loss_weights_multiply_the_loss_and_count_in_the_denominator(params, nll_by_mask):
    batch = answers(16)
    weights = np.tile([9.0, 9.0, 0.5, 2.0, 0.0, 3.0], (16, 1)).astype(np.float32)
    mask = batch.loss_mask & (weights > 0)
    batch = dataclasses.replace(batch, loss_weights=jnp.asarray(weights), loss_mask=mask)
    noise = NoiseConfig(**BAND, complementary=True)
    output = make_eval_step(ONE_LAYER, "bdlm")(params, batch, context(noise=noise))
    block = block_index(batch.positions, BLOCK, "document")
    members = corrupt(batch, block, jnp.int32(BLOCK), noise, mask_id=MASK, seed=0)
    nll = nll_by_mask[[number(m.noise_mask) for m in members]]
    want = sum((weights * m.weight * n).sum() for m, n in zip(members, nll, strict=True))
    np.testing.assert_allclose(output.loss.total, want, rtol=1e-5)
    assert float(output.loss.weight) == 2 * 16 * 5.5
    np.testing.assert_allclose(output.nll.sum() * 2, want, rtol=1e-5)
    ar = make_eval_step(ONE_LAYER, "ar")
    ones = jnp.ones_like(batch.loss_weights)
    plain = ar(params, dataclasses.replace(batch, loss_weights=ones), context(1))
    output = ar(params, batch, context(1))
    np.testing.assert_allclose(output.nll, plain.nll * weights, rtol=1e-5)
    np.testing.assert_allclose(output.loss.total, output.nll.sum(), rtol=1e-5)
    assert (float(plain.loss.weight), float(output.loss.weight)) == (16 * 3, 16 * 5.5)


@functools.partial(jax.jit, static_argnames="n")
def gradient_of_cap(params, batch, context, n=1):
    trained, buffers = nnx.split_state(params, nnx.Param, ...)
    grads, output = accumulated("cap", ONE_LAYER, trained, buffers, batch, context, n)
    return grads, output.loss


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6, rtol=1e-4)


CAP = context(
    4,
    NoiseConfig(**BAND, complementary=True, later_turns="hide"),
    cap=CapConfig(weight=0.7, temperature=0.5),
)


def packings():
    """The same documents in rows of 20 tokens and of 32; of one shape, its rows an even number."""
    batches = [packed(chats(), row_length) for row_length in (20, 32)]
    rows, length = np.max([b.tokens.shape for b in batches], axis=0)
    rows += rows % 2
    return [
        jax.tree.map(lambda x: np.pad(x, [(0, rows - len(x)), (0, length - x.shape[1])]), batch)
        for batch in batches
    ]


def test_gradient_depends_neither_on_packing_nor_on_accumulation(params):
    """Of CAP, which holds that of SFT and of pretraining."""
    first, second = packings()
    gradient, _ = gradient_of_cap(params, first, CAP)
    assert_close(gradient, gradient_of_cap(params, second, CAP)[0])
    assert_close(gradient, gradient_of_cap(params, first, CAP, n=2)[0])


def test_gradient_of_cap_is_that_of_the_naive_form(params):
    batch = packings()[1]
    draw = draw_noise(batch, CAP)

    def naive(params):
        model = merge_params(ONE_LAYER, params)
        hidden, _ = noisy_hidden(model, draw.batch, draw.noised, draw.block, CAP, clean_half=True)
        logits = model.logits(hidden)
        logp = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(logp, draw.batch.tokens[..., None], -1)[..., 0]
        sharp = jax.nn.log_softmax(logits / 0.5)
        entropy = -(jnp.exp(sharp) * sharp).sum(-1)
        entropy = jnp.where(logits.argmax(-1) == draw.batch.tokens, entropy, 0.0)
        sft = (draw.masked * draw.noised.weight * nll).sum() / draw.supervised.sum()
        return sft + 0.7 * (draw.masked * entropy).sum() / draw.masked.sum()

    value, grads = jax.jit(jax.value_and_grad(naive))(params)
    got, loss = gradient_of_cap(params, batch, CAP)
    np.testing.assert_allclose(loss.mean(), value, rtol=1e-5)
    assert_close(got, nnx.split_state(grads, nnx.Param, ...)[0])


def test_cap_without_a_masked_token_is_finite():
    batch = make_batch([[1, 2, 3, 4]], loss_mask=np.zeros((1, 4), bool))
    drawn = jax.jit(functools.partial(whole_batch_context, "cap"))(batch, context(2))
    assert np.isfinite(drawn.supervised_per_masked)


# ------------------------------------------------------------------ the token-to-token stream


def test_random_tokens_replace_a_share_of_the_visible_answer():
    batch, noise = answers(60_000), NoiseConfig(**BAND)
    block = block_index(batch.positions, BLOCK, "document")
    (noised,) = corrupt(batch, block, jnp.int32(BLOCK), noise, mask_id=5, seed=0)
    about = {"mask_id": 5, "vocab_size": 16, "seed": 0}
    tokens = np.asarray(replace_visible(batch, noised, 0.4, **about))
    visible = np.asarray(~noised.noise_mask & batch.loss_mask)
    assert np.array_equal(tokens[~visible], np.asarray(noised.tokens)[~visible])
    counts = np.bincount(tokens[visible & (np.asarray(batch.tokens) == 9)], minlength=16)
    share = counts / counts.sum()
    assert share[5] == 0
    assert share[9] == pytest.approx(0.6 + 0.4 / 15, abs=0.02)
    others = np.delete(share, [5, 9])
    np.testing.assert_allclose(others, 0.4 / 15, atol=0.01)
    again = replace_visible(batch, noised, 0.4, **about, draw=1)
    assert not np.array_equal(tokens, again)


def test_random_tokens_do_not_depend_on_packing():
    found = []
    for batch in packings():
        draw = draw_noise(batch, CAP)
        tokens = np.asarray(
            replace_visible(draw.batch, draw.noised, 0.3, mask_id=MASK, vocab_size=16, seed=0)
        )
        where = np.asarray(draw.supervised) > 0
        fields = draw.batch.document_ids, draw.batch.document_positions, draw.noised.noise_mask
        found.append(sorted(zip(*(np.asarray(x)[where] for x in (*fields, tokens)), strict=True)))
    assert found[0] == found[1]


def test_the_visible_tokens_are_asked_for_themselves(params):
    """In sight of those that were replaced."""
    batch = answers(16)
    drawn = context(noise=NoiseConfig(edit_rate=0.5, edit_weight=0.25))
    output = make_eval_step(ONE_LAYER, "bdlm")(params, batch, drawn)
    draw = draw_noise(batch, drawn)
    noisy = replace_visible(batch, draw.noised, 0.5, mask_id=MASK, vocab_size=16, seed=0)
    nll = nll_of(params, batch, noisy)
    weights = draw.masked * draw.noised.weight + 0.25 * draw.visible
    np.testing.assert_allclose(output.loss.total, (weights * nll).sum(), rtol=1e-5)
    assert float(output.loss.weight) == 16 * 4
    visible = np.asarray(draw.visible) > 0
    np.testing.assert_allclose(output.metrics["edit_nll"].mean(), nll[visible].mean(), rtol=1e-5)
    replaced = int((visible & (noisy != batch.tokens)).sum())
    assert 5 < replaced == float(output.metrics["edit_recovery"].weight) < visible.sum()
