"""Likelihood of texts: every token once, under the model that its row says, with its error."""

import dataclasses

import jax
import numpy as np
import pytest

from llada2_jax.checkpoint import ModelBundle
from llada2_jax.data.documents import stable_hash
from llada2_jax.data.tokenizer import tokenizer_files, train_tokenizer
from llada2_jax.evals import likelihood
from llada2_jax.evals.likelihood import left_to_right_nll, score_texts, validation_contexts
from llada2_jax.types import SpecialTokens
from tests.helpers import config, make_batch, random_params

CFG = config(vocab_size=262)  # nothing but reserved ids and bytes: a character is a token
SPECIAL = SpecialTokens(mask=0, eos=1, pad=1, bos=2)
TEXT = "x = [1, 2]\n"


@pytest.fixture(scope="module")
def bundle():
    return ModelBundle(
        config=CFG,
        params=random_params(CFG, 0, 0.3),
        special=SPECIAL,
        tokenizer_files=tokenizer_files(train_tokenizer([TEXT], CFG.vocab_size)),
    )


def without_bos(bundle):
    return dataclasses.replace(bundle, special=dataclasses.replace(SPECIAL, bos=None))


def rows_of(bundle, texts, row_length, objective="bdlm"):
    tokenizer = likelihood.tokenizer_of(bundle)
    return likelihood._rows(bundle, tokenizer, texts, row_length, objective)


# ---------------------------------------------------------------------------------------- rows


def test_rows_hold_every_token_of_a_text_once(bundle):
    batch, owner = rows_of(bundle, [TEXT, "é", "full"], row_length=5)
    assert owner.tolist() == [0, 0, 0, 1, 2]  # four tokens a row after the bos; é is two bytes
    tokenizer = likelihood.tokenizer_of(bundle)
    for i, text in enumerate((TEXT, "é", "full")):
        mine = owner == i
        scored = batch.loss_mask[mine]
        assert tokenizer.decode(batch.tokens[mine][scored].tolist()) == text
        # Noise goes by the document and the place in it (bos is place 0), wherever rows begin.
        assert set(batch.document_ids[mine].flat) == {stable_hash(text)}
        count = len(text.encode())
        assert batch.document_positions[mine][scored].tolist() == list(range(1, count + 1))
    assert (batch.tokens[:, 0] == SPECIAL.bos).all() and not batch.loss_mask[:, 0].any()
    used = batch.segment_ids == 1
    np.testing.assert_array_equal(used[:, 1:], batch.loss_mask[:, 1:])
    assert (batch.tokens[~used] == SPECIAL.pad).all() and not batch.segment_ids[~used].any()
    np.testing.assert_array_equal(batch.positions[used], np.nonzero(used)[1])


@pytest.mark.parametrize(("objective", "scored"), [("bdlm", 11), ("ar", 8)])
def test_without_bos_nothing_predicts_what_opens_a_row_left_to_right(bundle, objective, scored):
    batch, owner = rows_of(without_bos(bundle), [TEXT], 5, objective)
    assert len(owner) == 3 and batch.loss_mask.sum() == scored
    assert batch.loss_mask[:, 0].all() == (objective == "bdlm")


# ------------------------------------------------------------------------------------- figures


def test_a_text_is_the_sum_of_its_rows(bundle):
    """Rows do not see each other, so that the pieces can as well be texts of their own; and each
    is the chain of its tokens after the bos, whatever pads it."""
    options = {"block_size": 1, "samples": 1, "row_length": 5, "rows_per_step": 4}
    [whole] = score_texts(bundle, [TEXT], **options)
    pieces = score_texts(bundle, [TEXT[:4], TEXT[4:8], TEXT[8:]], **options)
    assert whole.nats == pytest.approx(sum(p.nats for p in pieces), rel=1e-5)
    assert (whole.tokens, whole.bytes) == (11, 11) and whole.nats_stderr == 0
    ids = [SPECIAL.bos, *likelihood.tokenizer_of(bundle).encode(TEXT[8:]).ids]
    chain = left_to_right_nll(CFG, bundle.params, make_batch([ids]), SPECIAL.mask)
    assert pieces[2].nats == pytest.approx(float(chain[0, 1:].sum()), rel=1e-5)
    assert whole.bits_per_byte == pytest.approx(whole.nats / np.log(2) / 11)


def test_bytes_are_those_of_the_scored_tokens(bundle):
    [score] = score_texts(
        without_bos(bundle), [TEXT], block_size=1, row_length=5, rows_per_step=4, objective="ar"
    )
    assert (score.tokens, score.bytes) == (8, 8) and score.nats > 0


def test_the_chain_is_zero_where_nothing_is_supervised(bundle):
    mask = np.asarray([[False, True, False, True]])
    batch = make_batch([[2, 70, 71, 72]], loss_mask=mask)
    nll = np.asarray(jax.jit(lambda p: left_to_right_nll(CFG, p, batch, 0))(bundle.params))
    np.testing.assert_array_equal(nll > 0, mask)


def test_the_standard_error_is_of_the_mean_over_draws():
    draws = np.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]])  # totals 3, 7 and 14
    scored = np.asarray([[True, True], [True, False]])
    score = likelihood._likelihood(draws, 2 * scored, scored)
    assert score.nats == pytest.approx(8.0)
    assert score.nats_stderr == pytest.approx(np.sqrt((25 + 1 + 36) / 2) / np.sqrt(3))
    assert (score.tokens, score.bytes) == (3, 6)
    assert score.bits_per_byte_stderr == pytest.approx(score.nats_stderr / np.log(2) / 6)
    assert likelihood._likelihood(draws[:1], scored, scored).nats_stderr == 0


def test_validation_noise_is_the_same_in_every_run():
    """Figures of different runs compare: one seed for all, a draw of its own for each sample."""
    contexts = validation_contexts(4, 0, 3)
    assert [int(c.draw) for c in contexts] == [0, 1, 2]
    assert {c.seed for c in contexts} == {20251215} and {int(c.block_size) for c in contexts} == {4}
    assert {c.block_anchor for c in contexts} == {"document"}
