"""Documents to packed rows: every token once, whoever asks, and the tokenizer's bytes add up."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from llada2_jax.config import DataConfig
from llada2_jax.data.corpus import Corpus, Source, load_corpus
from llada2_jax.data.documents import Document, documents, python_files, split_of, stable_hash
from llada2_jax.data.loader import batches, validation_batches
from llada2_jax.data.mixing import ShuffledRows
from llada2_jax.data.packing import PackedRows, TokenizedDocuments, tokenize
from llada2_jax.data.tokenizer import (
    EOS,
    MASK,
    RESERVED,
    token_byte_lengths,
    tokenizer_files,
    train_tokenizer,
)
from llada2_jax.types import SpecialTokens

BOS_ID, EOS_ID = 2, 1
ROW = 8


def documents_of(lengths) -> TokenizedDocuments:
    """Documents bos x … x eos whose inner tokens are all different."""
    inner = iter(range(10, 10_000))
    rows = [[BOS_ID, *(next(inner) for _ in range(n - 2)), EOS_ID] for n in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.asarray([100 + i for i in range(len(lengths))], np.int32)
    return TokenizedDocuments(np.concatenate(rows).astype(np.int32), ids, offsets)


DOCUMENTS = documents_of([5, 13, 2, 7, 21, 3, 9, 4])  # 64 tokens: eight rows an epoch


def rows_of(num_rows=40, seed=0, **changes) -> PackedRows:
    return PackedRows(DOCUMENTS, ROW, num_rows, seed, BOS_ID, **changes)


def corpus_of(special) -> Corpus:
    return Corpus((Source("a", DOCUMENTS, DOCUMENTS),), np.ones(10_000, np.int32), special)


def stream(rows, name, count=None):
    return np.concatenate([rows[i][name] for i in range(len(rows) if count is None else count)])


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


# ------------------------------------------------------------------------------------ packing


def test_a_row_depends_on_its_number_alone():
    forwards, backwards = rows_of(), rows_of()
    kept = [forwards[i] for i in range(40)]
    for i in reversed(range(40)):
        same(backwards[i], kept[i])
    same(rows_of(num_rows=1000)[39], kept[39])
    other = rows_of(seed=1)
    assert any((other[i]["tokens"] != kept[i]["tokens"]).any() for i in range(8))


def test_the_last_rows_that_fill_no_step_are_left():
    assert len(list(batches(rows_of(11), rows_per_step=4, first_step=0))) == 2


@pytest.mark.parametrize("first_step", [0, 3, 9])
def test_batches_from_a_step_on_are_those_of_a_fresh_reader(first_step):
    rows = ShuffledRows(rows_of(), 0)
    everything = list(batches(rows, rows_per_step=4, first_step=0))
    resumed = list(batches(rows, rows_per_step=4, first_step=first_step))
    assert len(everything) == 10 and len(resumed) == 10 - first_step
    for a, b in zip(everything[first_step:], resumed, strict=True):
        same(dataclasses.asdict(a), dataclasses.asdict(b))


@pytest.mark.parametrize("shares", [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 2], [1, 3]]])
def test_processes_read_their_shares_of_the_same_batches(shares):
    rows = ShuffledRows(rows_of(), 0)
    whole = list(batches(rows, rows_per_step=4, first_step=3))
    parts = [list(batches(rows, rows_per_step=4, first_step=3, share=share)) for share in shares]
    assert len(whole) == 7 and {len(part) for part in parts} == {7}
    for step, batch in enumerate(whole):
        for part, share in zip(parts, shares, strict=True):
            np.testing.assert_array_equal(part[step].tokens, batch.tokens[share])


def test_shuffling_mixes_the_rows_of_an_epoch_and_keeps_epochs_apart():
    # The order does not depend on how many rows are asked for.
    inorder, shuffled = rows_of(40), ShuffledRows(rows_of(36), 0)
    orders = []
    for epoch in range(5):
        numbers = range(8 * epoch, 8 * epoch + 8)
        key = [tuple(inorder[i]["tokens"]) + tuple(inorder[i]["visits"]) for i in numbers]
        got = [tuple(shuffled[i]["tokens"]) + tuple(shuffled[i]["visits"]) for i in numbers]
        assert sorted(got) == sorted(key)
        orders.append([key.index(g) for g in got])
    assert orders[0] != list(range(8)) and len(set(map(tuple, orders))) == 5


def test_every_token_comes_once_an_epoch():
    rows = rows_of()
    tokens, visits = stream(rows, "tokens"), stream(rows, "visits")
    ids, positions = stream(rows, "document_ids"), stream(rows, "document_positions")
    want = [(100 + d, p) for d, n in enumerate(DOCUMENTS.lengths) for p in range(n)]
    orders = []
    for epoch in range(5):
        at = visits == epoch
        assert at.sum() == rows.epoch_tokens
        assert sorted(zip(ids[at], positions[at], strict=True)) == want
        source = DOCUMENTS.offsets[ids[at] - 100] + positions[at]
        np.testing.assert_array_equal(tokens[at], DOCUMENTS.tokens[source])
        orders.append(tuple(ids[at][positions[at] == 0]))
    assert len(set(orders)) == 5  # each epoch has an order of its own


def test_epochs_follow_each_other_inside_a_row():
    odd = PackedRows(documents_of([5, 6]), ROW, 11, 0, BOS_ID)  # 11 tokens an epoch
    assert odd.epoch_rows == 1
    visits = stream(odd, "visits")
    np.testing.assert_array_equal(visits, np.repeat(np.arange(8), 11))


def test_without_shuffling_documents_stay_in_order():
    rows = rows_of(8, shuffle=False)
    np.testing.assert_array_equal(stream(rows, "tokens"), DOCUMENTS.tokens)


def test_segments_are_documents_and_positions_restart():
    for i in range(40):
        row = rows_of()[i]
        starts = np.flatnonzero(np.diff(row["document_ids"], prepend=-1))
        want = np.zeros(ROW, int)
        want[starts] = 1
        np.testing.assert_array_equal(row["segment_ids"], np.cumsum(want))
        for s in np.unique(row["segment_ids"]):
            inside = row["segment_ids"] == s
            np.testing.assert_array_equal(row["positions"][inside], np.arange(inside.sum()))
            np.testing.assert_array_equal(np.diff(row["document_positions"][inside]), 1)


def test_bos_is_not_supervised_and_everything_else_is():
    rows = rows_of()
    np.testing.assert_array_equal(stream(rows, "loss_mask"), stream(rows, "tokens") != BOS_ID)
    without = dataclasses.replace(rows, bos=None)
    assert stream(without, "loss_mask").all()


def test_document_mask_off_makes_a_row_one_segment():
    rows = rows_of(document_mask=False)
    for i in range(8):
        assert (rows[i]["segment_ids"] == 1).all()
        np.testing.assert_array_equal(rows[i]["positions"], np.arange(ROW))
        np.testing.assert_array_equal(rows[i]["tokens"], rows_of()[i]["tokens"])
        # Noise goes by the document's own coordinates, which stay.
        np.testing.assert_array_equal(
            rows[i]["document_positions"], rows_of()[i]["document_positions"]
        )


@pytest.mark.parametrize("document_mask", [True, False])
def test_random_lengths_cut_their_share_of_rows_in_two(document_mask):
    plain = rows_of(400, document_mask=document_mask)
    for fraction, least, most in ((0.0, 0, 0), (0.5, 160, 240), (1.0, 400, 400)):
        cut = dataclasses.replace(plain, random_length_fraction=fraction)
        changed, places = 0, set()
        for i in range(400):
            a, b = plain[i], cut[i]
            np.testing.assert_array_equal(a["tokens"], b["tokens"])
            same(b, dataclasses.replace(cut)[i])
            extra = b["segment_ids"][-1] - a["segment_ids"][-1]
            assert extra in (0, 1)
            starts = set(np.flatnonzero(b["positions"] == 0))
            assert starts >= set(np.flatnonzero(a["positions"] == 0))
            assert len(starts) == b["segment_ids"][-1]
            changed += extra
            places |= starts
        if not document_mask:  # otherwise a cut may fall where a document ends anyway
            assert least <= changed <= most
        elif fraction:
            assert 0.5 * least < changed <= most
        if fraction:
            assert places == set(range(ROW))


def test_random_lengths_follow_the_seed():
    cuts = [
        stream(rows_of(40, seed, shuffle=False, random_length_fraction=0.5), "segment_ids")
        for seed in (0, 0, 1)
    ]
    assert (cuts[0] == cuts[1]).all() and (cuts[0] != cuts[2]).any()


def test_validation_rows_are_fixed_and_spread_over_the_split():
    special = SpecialTokens(mask=0, eos=EOS_ID, pad=EOS_ID, bos=BOS_ID)
    corpus = corpus_of(special)
    cfg = DataConfig(row_length=ROW, document_mask=False, random_length_fraction=1.0)
    a, b = corpus.validation_batches(cfg, 4, 2), corpus.validation_batches(cfg, 4, 2)
    assert len(a) == 2
    for x, y in zip(a, b, strict=True):
        same(dataclasses.asdict(x), dataclasses.asdict(y))
        # Both kinds of model answer for the same tokens: not for the first of a segment.
        np.testing.assert_array_equal(x.loss_mask, (x.tokens != BOS_ID) & (x.positions > 0))
    # Nor does it depend on how the training rows are made.
    for x, y in zip(a, corpus.validation_batches(DataConfig(row_length=ROW), 4, 2), strict=True):
        same(dataclasses.asdict(x), dataclasses.asdict(y))
    first_rows = np.concatenate([x.tokens for x in a])[[0, -1]]
    np.testing.assert_array_equal(first_rows, DOCUMENTS.tokens.reshape(8, ROW)[[0, -1]])
    rows = rows_of(shuffle=False)
    with pytest.raises(ValueError, match=r"eval\.rows=10, but the validation split holds 8"):
        validation_batches([(rows, 10)], num_rows=10, rows_per_step=2)
    with pytest.raises(ValueError, match=r"eval\.rows=3 is not a multiple of 2"):
        validation_batches([(rows, 3)], num_rows=3, rows_per_step=2)


def test_training_rows_follow_the_config():
    special = SpecialTokens(mask=0, eos=EOS_ID, pad=EOS_ID, bos=BOS_ID)
    corpus = corpus_of(special)
    cfg = DataConfig(row_length=ROW, document_mask=False, random_length_fraction=0.25)
    rows = corpus.training_rows(cfg, 7, 3)
    want = rows_of(7, 3, document_mask=False, random_length_fraction=0.25)
    assert rows == ShuffledRows(want, 3)


# ---------------------------------------------------------------------------------- tokenizer

TEXT = "def naïve(x):\n    return '→ 你好 🎉' + str(x)  # 12345\n\n\nclass A:\n\tpass\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 3], 290)


def test_reserved_ids_come_first(tokenizer):
    assert tokenizer.get_vocab_size() == 290
    assert [tokenizer.token_to_id(name) for name in RESERVED] == list(range(len(RESERVED)))
    assert " ".join(RESERVED) == (
        "<|mask|> <|endoftext|> <|startoftext|> <role> </role> <|role_end|>"
    )
    files = tokenizer_files(tokenizer)
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    settings = json.loads(files["tokenizer_config.json"])
    named = {k: v for k, v in settings.items() if k.endswith("_token")}
    assert named == {
        "mask_token": "<|mask|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "bos_token": "<|startoftext|>",
    }


@pytest.mark.parametrize("text", [TEXT, " \n\t \n", "ünïcödé 🎉", f"a {MASK} b {EOS}"])
def test_byte_lengths_add_up_to_the_text(tokenizer, text):
    tokens = tokenize([Document(1, "a", text)], tokenizer, eos=EOS_ID, bos=BOS_ID).tokens
    assert token_byte_lengths(tokenizer)[tokens].sum() == len(text.encode())
    assert tokenizer.decode(list(tokens), skip_special_tokens=True) == text


def test_reserved_names_in_a_text_are_text(tokenizer):
    text = f"{MASK} {EOS} <role>"
    tokens = tokenize([Document(1, "a", text)], tokenizer, eos=EOS_ID, bos=BOS_ID).tokens
    assert tokens[0] == BOS_ID and tokens[-1] == EOS_ID
    assert not set(tokens[1:-1]) & set(range(len(RESERVED)))
    # The caller's tokenizer is left as it was.
    assert tokenizer.encode(MASK, add_special_tokens=False).ids == [0]


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_what_a_tokenizer_does_to_batches_is_not_done_to_documents(tokenizer, setting):
    cutting = Tokenizer.from_str(tokenizer.to_str())
    cutting.enable_truncation(8) if setting == "truncation" else cutting.enable_padding()
    docs = [Document(1, "a", TEXT), Document(2, "b", "y")]
    found, want = (tokenize(docs, t, eos=EOS_ID, bos=BOS_ID) for t in (cutting, tokenizer))
    assert found.digest == want.digest


def test_tokenized_documents_keep_their_bounds(tokenizer):
    docs = [Document(7, "a", "x = 1\n"), Document(8, "b", "y")]
    tokenized = tokenize(docs, tokenizer, eos=EOS_ID, bos=None)
    assert tokenized.ids.tolist() == [7, 8]
    assert (tokenized.tokens[tokenized.offsets[1:] - 1] == EOS_ID).all()
    assert tokenized.lengths.sum() == len(tokenized.tokens) and BOS_ID not in tokenized.tokens
    with pytest.raises(ValueError, match="no documents"):
        tokenize([], tokenizer, eos=EOS_ID, bos=None)


# ---------------------------------------------------------------------------------- documents


def test_the_split_is_stable_and_disjoint(tmp_path):
    assert stable_hash("abc") == 0xBA7816BF >> 1  # SHA-256's own test vector
    names = [f"m{i}.py" for i in range(400)]
    for name in names:
        (tmp_path / name).write_text("x\n")
    found = {s: [d.name for d in python_files(tmp_path, s)] for s in ("train", "validation")}
    assert sorted(found["train"] + found["validation"]) == sorted(names)
    assert found["validation"] == sorted(n for n in names if split_of(n) == "validation")
    # Where these fall is part of every figure that was ever published.
    chosen = (17, 51, 77, 111, 130, 168, 176, 363, 382)
    assert found["validation"] == sorted(f"m{i}.py" for i in chosen)
    # A file's split does not depend on which other files there are.
    for name in found["train"][:390]:
        (tmp_path / name).unlink()
    assert [d.name for d in python_files(tmp_path, "validation")] == found["validation"]


def test_what_is_not_a_document_is_left_out(tmp_path):
    for name in ("site-packages", "dist-packages", "__pycache__"):
        (tmp_path / "lib" / name / "deep").mkdir(parents=True)
        (tmp_path / "lib" / name / "deep" / "a.py").write_text("x")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "note.txt").write_text("x")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "good.py").write_text("x")
    found = [d for s in ("train", "validation") for d in python_files(tmp_path, s)]
    assert [(d.name, d.id, d.text) for d in found] == [
        ("package/good.py", stable_hash("package/good.py"), "x")
    ]
    with pytest.raises(ValueError, match="neither 'stdlib' nor a folder"):
        documents(str(tmp_path / "nowhere"), "train")


def test_a_corpus_is_the_files_of_a_folder(tmp_path, tokenizer, monkeypatch):
    for i in (17, 18, 19, 51):  # two of them are for validation
        (tmp_path / f"m{i}.py").write_text(f"x = {i}\n")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    special = SpecialTokens(mask=0, eos=EOS_ID, pad=EOS_ID, bos=BOS_ID)
    corpus = load_corpus(DataConfig(source=f"~/{tmp_path.name}"), tokenizer, special)
    [source] = corpus.sources
    for documents_, numbers in ((source.train, (18, 19)), (source.validation, (17, 51))):
        assert documents_.ids.tolist() == [stable_hash(f"m{i}.py") for i in numbers]
        for index, i in enumerate(numbers):
            tokens, weights = documents_.read(index, 0, int(documents_.lengths[index]))
            assert tokens[0] == BOS_ID and tokens[-1] == EOS_ID and (weights == 1).all()
            assert tokenizer.decode(list(tokens)) == f"x = {i}\n"
    np.testing.assert_array_equal(corpus.token_bytes, token_byte_lengths(tokenizer))
