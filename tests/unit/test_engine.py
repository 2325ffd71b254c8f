"""Requests to text: encoding, batches, streaming, defaults, errors."""

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer

import llada2_jax.engine
from llada2_jax.checkpoint import ModelBundle
from llada2_jax.data.tokenizer import tokenizer_files, train_tokenizer
from llada2_jax.engine import Completion, Engine, complete_characters, default_options, load
from llada2_jax.sampler import Generation, RequestError, SamplerOptions, tokens_per_forward
from llada2_jax.types import SpecialTokens
from tests.helpers import ONE_LAYER, random_params

VOCAB, BLOCK = 270, 4
CFG = dataclasses.replace(ONE_LAYER, vocab_size=VOCAB, max_position_embeddings=64)
SPECIAL = SpecialTokens(mask=0, eos=1, pad=1, bos=2)
SAMPLED = {"temperature": 1.2, "seed": 5}  # most prompts are two or three tokens: one program


@pytest.fixture(scope="module")
def bundle():
    tokenizer = train_tokenizer(["a short text to learn from", "and another text"], VOCAB)
    assert [tokenizer.token_to_id(t) for t in ("<|mask|>", "<|endoftext|>")] == [0, 1]
    return ModelBundle(
        config=CFG,
        params=random_params(CFG, 0, 0.5),
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


def test_a_prompt_is_read_whole(bundle, engine):
    """Whatever truncation tokenizer.json asks for."""
    cutting = Tokenizer.from_str(bundle.tokenizer_json())
    cutting.enable_truncation(3)
    engine_of_it = Engine(dataclasses.replace(bundle, tokenizer_files=tokenizer_files(cutting)))
    text = "a short text to learn from"
    assert engine_of_it.encode(text) == engine.encode(text) and len(engine.encode(text)) > 3


def test_batches_keep_the_order_and_change_nothing(bundle, engine):
    prompts = ["a short text to learn from", "", [5, 6, 7], "and", "a text"]
    together = Engine(bundle, max_batch=5).generate(prompts, **SAMPLED)
    counts = []
    in_twos = engine.generate(prompts, progress=counts.append, **SAMPLED)
    assert counts == [2, 2, 1]
    assert [c.tokens for c in in_twos] == [c.tokens for c in together]
    assert [c.prompt_tokens for c in in_twos] == [engine.encode(p) for p in prompts]
    assert together[1].prompt_tokens == [] and together[1].accepted == 8  # two blocks of masks


def test_a_stream_is_the_completion_in_pieces(engine):
    *pieces, last = engine.stream("a text")
    whole = engine.generate("a text")
    assert isinstance(last, Completion) and last.tokens == whole.tokens
    assert "".join(pieces) == last.text == whole.text
    assert last.denoise_forwards == whole.denoise_forwards


def test_a_stream_draws_what_its_prompt_draws_in_a_batch(engine):
    together = engine.generate(["a text", "a text"], **SAMPLED)
    assert together[0].tokens != together[1].tokens
    for row, completion in enumerate(together):
        *_, last = engine.stream("a text", row_id=row, **SAMPLED)
        assert last.tokens == completion.tokens


def generation(tokens: list[int], done: bool) -> Generation:
    counts = np.ones(1, np.int32)
    record = np.zeros((1, len(tokens)), np.float32)
    return Generation(
        tokens=[tokens],
        accepted_at=record.astype(np.int32),
        confidence=record,
        edits=record.astype(np.int32),
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


@pytest.mark.parametrize(
    ("texts", "pieces", "warned"),
    [
        (["do", "don", "don't"], ["do", "n", "'t"], False),
        (["do n", "don", "do not"], ["do n", "ot"], False),  # back again: it goes on from there
        (["do n", "don't", "don't!"], ["do n", "n't!"], True),  # what was sent is not in the text
        (["do not", "do"], ["do not", ""], True),
        (["a\ufffd", "ab", "abc\ufffd"], ["a", "b", "c\ufffd"], False),
    ],
)
def test_a_decoder_that_rewrites_loses_nothing(engine, monkeypatch, caplog, texts, pieces, warned):
    steps = [generation([5] * n, n == len(texts)) for n in range(1, len(texts) + 1)]
    monkeypatch.setattr(llada2_jax.engine, "stream_tokens", lambda *_: iter(steps))
    monkeypatch.setattr(engine, "decode", lambda tokens: texts[len(tokens) - 1])
    *sent, last = engine.stream("x")
    assert sent == pieces and last.text == texts[-1]
    assert ("rewrote text that had been sent" in caplog.text) == warned
    assert warned or "".join(sent) == last.text


def test_tokens_per_forward_over_batches_and_completions(engine):
    done = [
        c for seed in (1, 2) for c in engine.generate(["a text", "and"], **SAMPLED | {"seed": seed})
    ]
    accepted, denoise, commits = (
        sum(getattr(c, name) for c in done)
        for name in ("accepted", "denoise_forwards", "commit_forwards")
    )
    assert tokens_per_forward(*done) == pytest.approx(accepted / denoise)
    assert tokens_per_forward(*done, commits=True) == pytest.approx(accepted / (denoise + commits))
    assert tokens_per_forward(done[0]) == done[0].tokens_per_forward
    assert tokens_per_forward() == 0.0


def test_a_mask_spelled_in_a_prompt_is_a_token(engine):
    ids = engine.encode("<|mask|>a<|mask|>")
    assert ids[0] == ids[-1] == SPECIAL.mask
    completion = engine.generate("<|mask|><|mask|><|mask|>", stop_on_eos=False)
    assert completion.accepted == 12 - 3 and len(completion.tokens) == 7  # three blocks
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
    no_id = dataclasses.replace(bundle, special=dataclasses.replace(SPECIAL, bos=None))
    no_id = dataclasses.replace(no_id, generation={"add_bos": True})
    with pytest.raises(RequestError, match="special.bos"):
        Engine(no_id)


def test_defaults_come_from_the_model(engine):
    assert engine.options().block_size == BLOCK
    assert engine.options(threshold=0.7, top_k=None).threshold == 0.7
    assert engine.options(threshold=None).threshold == 0.2


@pytest.mark.parametrize(
    ("generation", "options"),
    [
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {"temperature": 0, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.7}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": None, "temperature": 1}, {"temperature": 1.0}),
        ({"block_length": 8}, {"block_size": 8}),
        ({"block_size": 4, "block_length": 8}, {"block_size": 4}),
        ({"steps": 3, "num_beams": 1, "max_length": "any"}, {"steps": 3}),
    ],
)
def test_generation_defaults(generation, options):
    assert default_options(generation) == SamplerOptions(**options)


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'; it must be of type float"),
        ({"max_new_tokens": 7.0}, "max_new_tokens is 7.0; it must be of type int"),
        ({"top_k": True}, "top_k is True; it must be of type int"),
        ({"steps": [4]}, r"steps is \[4\]; it must be of type int"),
        ({"block_length": "32"}, "block_length is '32'; it must be of type int"),
        ({"early_stop": 1}, "early_stop is 1; it must be of type bool"),
        ({"do_sample": "no"}, "do_sample is 'no'; it must be of type bool"),
        ({"add_bos": "yes"}, "add_bos is 'yes'; it must be of type bool"),
        ({"do_sample": True, "temperature": 0}, "temperature is 0.0; it must be more than 0 where"),
        ({"threshold": 2.0}, r"threshold=2.0: must be in \[0, 1\]"),
    ],
)
def test_a_wrong_default_is_named_with_its_file(bundle, generation, message):
    with pytest.raises(RequestError, match=rf"^generation_config\.json .*: {message}"):
        Engine(dataclasses.replace(bundle, generation=generation))


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
