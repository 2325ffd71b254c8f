"""Requests to text: encoding, batches, streaming, defaults, errors."""

import dataclasses

import numpy as np
import pytest

import llada2_jax.engine
from llada2_jax.checkpoint import ModelBundle
from llada2_jax.data.tokenizer import tokenizer_files, train_tokenizer
from llada2_jax.engine import Completion, Engine, complete_characters, load
from llada2_jax.model import init_params
from llada2_jax.sampler import Generation, RequestError
from llada2_jax.types import SpecialTokens
from tests.helpers import config

VOCAB, BLOCK = 270, 4
CFG = config(vocab_size=VOCAB, initializer_range=0.5, max_position_embeddings=64)
SPECIAL = SpecialTokens(mask=0, eos=1, pad=1, bos=2)


@pytest.fixture(scope="module")
def bundle():
    tokenizer = train_tokenizer(["a short text to learn from", "and another text"], VOCAB)
    assert [tokenizer.token_to_id(t) for t in ("<|mask|>", "<|endoftext|>")] == [0, 1]
    return ModelBundle(
        config=CFG,
        params=init_params(CFG, 0),
        special=SPECIAL,
        tokenizer_files=tokenizer_files(tokenizer),
        generation={"block_length": BLOCK, "max_new_tokens": 7, "threshold": 0.2, "top_k": None},
    )


@pytest.fixture(scope="module")
def engine(bundle):
    return Engine(bundle, max_batch=2)


def test_text_in_text_out(engine):
    completion = engine.generate("a text", trajectory=True)
    assert isinstance(completion, Completion)
    assert completion.text == engine.decode(completion.tokens)
    assert completion.prompt_tokens == engine.tokenizer.encode("a text").ids
    assert completion.tokens_per_forward >= completion.tokens_per_forward_with_commits
    assert completion.finish_reason == ("eos" if completion.tokens[-1] == 1 else "length")
    assert len(completion.trajectory.accepted_at) == len(completion.tokens)
    assert (completion.trajectory.accepted_at >= 0).all()
    assert (completion.trajectory.confidence > 0).all()
    assert engine.generate("a text").trajectory is None


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.2, "seed": 5}], ids=str)
def test_batches_keep_the_order_and_change_nothing(bundle, engine, sampling):
    prompts = ["a short text to learn from", "", [5, 6, 7], "and", "a text"]
    together = Engine(bundle, max_batch=5).generate(prompts, **sampling)
    in_twos = engine.generate(prompts, **sampling)
    assert [c.tokens for c in in_twos] == [c.tokens for c in together]
    assert [c.prompt_tokens for c in in_twos] == [engine.encode(p) for p in prompts]
    if not sampling:
        assert engine.generate("a text").tokens == together[4].tokens


def test_a_stream_is_the_completion_in_pieces(engine):
    *pieces, last = engine.stream("a text", max_new_tokens=12)
    whole = engine.generate("a text", max_new_tokens=12)
    assert isinstance(last, Completion) and last.tokens == whole.tokens
    assert "".join(pieces) == last.text == whole.text
    assert last.denoise_forwards == whole.denoise_forwards


def generation(tokens: list[int], done: bool) -> Generation:
    counts = np.ones(1, np.int32)
    record = np.zeros((1, len(tokens)), np.float32)
    return Generation(
        tokens=[tokens],
        accepted_at=record.astype(np.int32),
        confidence=record,
        denoise_forwards=counts,
        commit_forwards=counts,
        commits=counts,
        accepted=counts,
        ended_by_eos=np.array([False]),
        done=np.array([done]),
        compile_seconds=0.0,
        seconds=1.0,
    )


def test_characters_wait_for_their_last_byte(engine, monkeypatch):
    ids = engine.tokenizer.encode("é😀€!").ids
    assert len(ids) == 2 + 4 + 3 + 1  # untrained text: a token is a byte
    steps = [generation(ids[:n], n == len(ids)) for n in range(1, len(ids) + 1)]
    monkeypatch.setattr(llada2_jax.engine, "stream_tokens", lambda *_: iter(steps))
    *pieces, last = engine.stream("x")
    assert pieces == ["é", "😀", "€", "!"]
    assert last.text == "é😀€!"
    # A text that ends within a character is not cut: its last bytes come at the end.
    steps[:] = [generation(ids[:n], n == 4) for n in (1, 2, 3, 4)]
    *pieces, last = engine.stream("x")
    assert "".join(pieces) == last.text
    assert complete_characters(last.text) == "é"


def test_a_mask_spelled_in_a_prompt_is_a_token(engine):
    ids = engine.encode("<|mask|>a<|mask|>")
    assert ids[0] == ids[-1] == SPECIAL.mask
    completion = engine.generate("<|mask|><|mask|><|mask|>", stop_on_eos=False, max_new_tokens=5)
    assert completion.accepted == 5 and len(completion.tokens) == 5
    assert SPECIAL.mask not in completion.tokens


def test_bos_where_the_model_wants_it(bundle):
    with_bos = Engine(
        dataclasses.replace(bundle, generation={**bundle.generation, "add_bos": True})
    )
    assert with_bos.encode("") == [SPECIAL.bos]
    assert with_bos.encode("a")[0] == SPECIAL.bos
    assert with_bos.encode("<|startoftext|>a") == with_bos.encode("a")
    assert with_bos.encode([5]) == [5]
    assert Engine(bundle).encode("") == []
    assert Engine(bundle).generate("").accepted == 8  # two blocks of masks
    no_id = dataclasses.replace(bundle, special=dataclasses.replace(SPECIAL, bos=None))
    no_id = dataclasses.replace(no_id, generation={"add_bos": True})
    with pytest.raises(RequestError, match="special.bos"):
        Engine(no_id)


def test_defaults_come_from_the_model(engine):
    assert engine.options().block_size == BLOCK
    assert engine.options(threshold=0.7, top_k=None).threshold == 0.7
    assert engine.options(threshold=None).threshold == 0.2


def test_bad_requests_are_named(bundle, engine):
    with pytest.raises(RequestError, match="no option block_length: choose from .*block_size"):
        engine.generate("a", block_length=4)
    with pytest.raises(RequestError, match="threshold=2"):
        engine.generate("a", threshold=2)
    with pytest.raises(RequestError, match="no parameters"):
        Engine(dataclasses.replace(bundle, params=None))
    with pytest.raises(RequestError, match="max_batch=0"):
        Engine(bundle, max_batch=0)
    assert engine.generate([]) == []


def test_a_model_without_a_tokenizer_takes_ids(bundle):
    engine = Engine(dataclasses.replace(bundle, tokenizer_files={}))
    assert engine.generate([[5, 6]])[0].text is None
    with pytest.raises(RequestError, match="no tokenizer.json"):
        engine.generate("text")


def test_load_passes_its_arguments_on(shared_goldens):
    engine = load(
        shared_goldens / "llada2_tiny", mask_id=383, eos_id=380, dtype="float32", max_batch=3
    )
    assert engine.max_batch == 3 and engine.bundle.config.dtype == "float32"
