"""Best fit and mixing: every document once an epoch, aligned, and rows that depend on their number
alone."""

import collections
import dataclasses
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llada2_jax.config import DataConfig
from llada2_jax.data.best_fit import BestFitRows, pack
from llada2_jax.data.corpus import Corpus, Source
from llada2_jax.data.loader import batches, to_batch
from llada2_jax.data.mixing import MixedRows
from llada2_jax.types import SpecialTokens

ROW, MULTIPLE, PAD = 32, 4, 1


@dataclasses.dataclass
class Fake:
    """Documents whose tokens say where they are from: document · 1000 + position + 10."""

    sizes: list[int]
    prompts: list[int]
    pairs: list[int] | None = None
    weighted: bool = False
    ends: list[int] | None = None

    @property
    def ids(self):
        return np.arange(len(self.sizes), dtype=np.int32) + 500

    @property
    def lengths(self):
        return np.asarray(self.sizes, np.int64)

    @property
    def chosen(self):
        return np.asarray(self.pairs or [0] * len(self.sizes), np.int64)

    @property
    def first_supervised(self):
        return np.asarray(self.prompts, np.int64)

    @property
    def supervised_end(self):
        return np.asarray(self.ends or self.sizes, np.int64)

    @property
    def paired(self):
        return self.pairs is not None

    def read(self, document, start, stop):
        positions = np.arange(start, stop)
        learned = (positions >= self.prompts[document]) & (
            positions < self.supervised_end[document]
        )
        weights = learned.astype(np.float32)
        if self.weighted:
            weights *= 0.5
        return (document * 1000 + positions + 10).astype(np.int32), weights


def rows_of(documents, **changes) -> BestFitRows:
    return BestFitRows(documents, ROW, 10_000, 0, PAD, MULTIPLE, **changes)


def segments(row):
    """The places and fields of each segment, in order."""
    for s in range(1, row["segment_ids"].max() + 1):
        at = np.flatnonzero(row["segment_ids"] == s)
        assert (np.diff(at) == 1).all() and at[0] % MULTIPLE == 0 and len(at) % MULTIPLE == 0
        np.testing.assert_array_equal(row["positions"][at], np.arange(len(at)))
        assert len(set(row["document_ids"][at])) == 1
        yield at, {name: values[at] for name, values in row.items()}


sizes = st.lists(st.integers(1, 3 * ROW), min_size=1, max_size=60)


@given(sizes, st.integers(0, 5), st.sampled_from(["skip", "split"]))
@settings(max_examples=60, deadline=None)
@example([1], 0, "skip")
@example([ROW] * 3 + [ROW + 1], 0, "split")
def test_each_epoch_holds_every_document_once(lengths, epoch, long):
    documents = Fake(lengths, [0] * len(lengths))
    rows = rows_of(documents, long_documents=long)
    kept = [d for d, n in enumerate(lengths) if long == "split" or n <= ROW]
    if not kept:
        message = f"fits a row: data.row_length=32, shortest document {min(lengths)} tokens"
        with pytest.raises(ValueError, match=message):
            _ = rows.epoch_rows
        return
    report = rows.report()
    assert report["skipped"] == len(lengths) - len(kept)
    assert report["split"] == sum(n > ROW for n in lengths if long == "split")
    seen, filled = [], 0
    for number in range(epoch * rows.epoch_rows, (epoch + 1) * rows.epoch_rows):
        row = rows[number]
        for _, part in segments(row):
            document = int(part["document_ids"][0]) - 500
            real = part["document_positions"] < lengths[document]
            source = document * 1000 + part["document_positions"] + 10
            np.testing.assert_array_equal(part["tokens"][real], source[real])
            # What rounds a document up is eos, and is learned as its end was.
            assert (part["tokens"][~real] == PAD).all() and part["loss_mask"].all()
            assert (part["visits"] == epoch).all() and (~real).sum() < MULTIPLE
            seen += [(document, int(p)) for p in part["document_positions"][real]]
            filled += real.sum()
        empty = row["segment_ids"] == 0
        assert not row["loss_mask"][empty].any() and (row["tokens"][empty] == PAD).all()
    assert sorted(seen) == [(d, p) for d in kept for p in range(lengths[d])]
    assert report["fill"] == pytest.approx(filled / (rows.epoch_rows * ROW))


def test_a_row_depends_on_its_number_alone():
    documents = Fake([5, 9, 17, 30, 2, 2, 11, 8, 8, 25], [0] * 10)
    a, b = rows_of(documents), rows_of(documents)
    kept = [a[i] for i in range(40)]
    for i in reversed(range(40)):
        for name, values in b[i].items():
            np.testing.assert_array_equal(values, kept[i][name])
    tokens = np.concatenate([row["tokens"] for row in map(a.__getitem__, range(5 * a.epoch_rows))])
    orders = set(map(tuple, tokens.reshape(5, -1)))
    assert len(orders) == 5
    # Neighbours in a row change from epoch to epoch: 2, 2 and 8, 8 are dealt anew.
    together = {
        frozenset(set(row["document_ids"][row["segment_ids"] > 0].tolist())) for row in kept
    }
    assert len(together) > a.epoch_rows


def test_prompts_are_not_learned_and_padding_follows_the_end():
    rows = rows_of(Fake([10, 7], [6, 3]))
    [row] = [rows[0]]
    for _, part in segments(row):
        document = int(part["document_ids"][0]) - 500
        prompt = [6, 3][document]
        want = part["document_positions"] >= prompt
        np.testing.assert_array_equal(part["loss_mask"], want)
    assert "loss_weights" not in row and "preference" not in row
    weighted = BestFitRows(Fake([10], [6], weighted=True), ROW, 1, 0, PAD, MULTIPLE, weighted=True)[
        0
    ]
    np.testing.assert_array_equal(weighted["loss_weights"][:12], [0.0] * 6 + [0.5] * 6)
    assert (weighted["loss_mask"] == (weighted["loss_weights"] > 0)).all()


def test_pieces_of_a_prompt_alone_are_left_out():
    rows = rows_of(Fake([100, 40], [64, 35]), long_documents="split")
    assert rows.report() | {"fill": 0} == {
        "documents": 2, "rows": 2, "fill": 0, "skipped": 0, "split": 2, "unsupervised": 3,
    }  # fmt: skip
    seen = {
        (int(part["document_ids"][0]) - 500, int(part["document_positions"][0]))
        for i in range(2)
        for _, part in segments(rows[i])
    }
    assert seen == {(0, 64), (0, 96), (1, 32)}


def test_pieces_after_the_last_supervised_token_are_left_out():
    rows = rows_of(Fake([100, 90], [2, 40], ends=[6, 65]), long_documents="split")
    assert rows.report()["unsupervised"] == 4 and rows.epoch_rows == 3
    masks = sorted(int(rows[i]["loss_mask"].sum()) for i in range(3))
    # 65 tokens end one after the row's 64: what rounds the last piece up is not learned.
    assert masks == [1, 4, 24]


def test_a_multiple_of_the_whole_row_gives_each_document_one_row():
    rows = BestFitRows(Fake([5, 9, 30], [3, 3, 3]), ROW, 100, 0, PAD, ROW)
    assert rows.epoch_rows == 3
    for i in range(3):
        row = rows[i]
        assert (row["segment_ids"] == 1).all() and row["loss_mask"][3:].all()
    with pytest.raises(ValueError, match="data.row_length=32 is not a multiple of data.pad_mul"):
        BestFitRows(Fake([5], [3]), ROW, 1, 0, PAD, 5)


def test_pairs_lie_side_by_side_and_share_an_id():
    pairs = Fake([11, 20, 40, 9], [2, 3, 3, 1], pairs=[6, 9, 20, 4])
    rows = rows_of(pairs, long_documents="split")
    assert rows.report()["skipped"] == 1 and rows.report()["split"] == 0  # pairs are never split
    found = {}
    for i in range(rows.epoch_rows):
        parts = [part for _, part in segments(rows[i])]
        for chosen, rejected in zip(parts[::2], parts[1::2], strict=True):
            document = int(chosen["document_ids"][0]) - 500
            assert rejected["document_ids"][0] - 500 == document
            assert (chosen["preference"] == 1).all() and (rejected["preference"] == -1).all()
            cut, size = pairs.pairs[document], pairs.sizes[document]
            np.testing.assert_array_equal(
                chosen["tokens"][:cut], document * 1000 + np.arange(cut) + 10
            )
            np.testing.assert_array_equal(
                rejected["tokens"][: size - cut], document * 1000 + np.arange(cut, size) + 10
            )
            # Both texts count their positions from 0, so that they share their noise.
            for part in (chosen, rejected):
                assert part["document_positions"][0] == 0
            found[document] = found.get(document, 0) + 1
        assert (rows[i]["preference"][rows[i]["segment_ids"] == 0] == 0).all()
    assert found == {0: 1, 1: 1, 3: 1}


def _best_fit_by_hand(sizes, capacity):
    """The textbook's algorithm: rows needed."""
    room = []
    for size in sorted(sizes, reverse=True):
        fits = [r for r in room if r >= size]
        if fits:
            room[room.index(min(fits))] -= size
        else:
            room.append(capacity - size)
    return len(room)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=80), st.integers(12, 20))
@settings(max_examples=150, deadline=None)
def test_packing_is_best_fit_decreasing(sizes, capacity):
    rows, count = pack(np.bincount(sizes, minlength=capacity + 1), capacity)
    ordered = sorted(sizes, reverse=True)
    assert len(rows) == len(sizes) and set(rows) == set(range(count))
    assert np.bincount(rows, weights=ordered).max() <= capacity
    assert count == _best_fit_by_hand(sizes, capacity)


def _pack_by_rooms(sizes, capacity):
    """`pack` as it was: it looks at every room for every size."""
    open_rows, placed, rows = [[] for _ in range(capacity + 1)], [np.zeros(0, np.int64)], 0
    for size in range(capacity, 0, -1):
        left = int(sizes[size])
        for room in range(size, capacity + 1):
            if not left:
                break
            if room == capacity:
                fresh = -(-left // (capacity // size))
                open_rows[capacity] = [np.arange(rows, rows + fresh)]
                rows += fresh
            if not open_rows[room]:
                continue
            here, each = np.concatenate(open_rows[room]), room // size
            used = here[: -(-left // each)]
            items = np.repeat(used, each)[:left]
            full = len(items) // each
            open_rows[room] = [here[len(used) :]] if len(used) < len(here) else []
            open_rows[room - each * size].append(used[:full])
            if full < len(used):
                open_rows[room - (len(items) - full * each) * size].append(used[full:])
            placed.append(items)
            left -= len(items)
    return np.concatenate(placed), rows


@given(st.integers(1, 40), st.integers(0, 2**32), st.integers(1, 200), st.floats(0.2, 3))
@settings(max_examples=200, deadline=None)
@example(7, 0, 0, 1.0)
def test_the_layout_is_what_it_was(capacity, seed, count, skew):
    """Prepared runs go on: the order of their rows must not change."""
    drawn = np.random.default_rng(seed).random(count) ** skew
    sizes = np.bincount(np.ceil(drawn * capacity).astype(int), minlength=capacity + 1)
    rows, number = pack(sizes, capacity)
    want, wanted = _pack_by_rooms(sizes, capacity)
    np.testing.assert_array_equal(rows, want)
    assert number == wanted and rows.dtype == want.dtype


def test_rows_of_many_multiples_are_planned_in_a_time_that_follows_the_documents():
    """pad_multiple=1 and long rows: sizes times rooms would be 5e8."""
    capacity = 1 << 15
    sizes = np.ones(capacity + 1, np.int64)
    before = time.process_time()
    _, number = pack(sizes, capacity)
    assert time.process_time() - before < 5 and number >= capacity // 2


def test_a_realistic_mix_of_lengths_fills_rows():
    lengths = np.random.default_rng(0).lognormal(6, 1, 20_000).astype(int).clip(4, 4096).tolist()
    rows = BestFitRows(Fake(lengths, [0] * len(lengths)), 4096, 1, 0, PAD, 32)
    assert rows.report()["fill"] > 0.96  # rounding up alone costs 2.7 %


# ------------------------------------------------------------------------------------- mixing


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Rows that say where they are from."""

    name: int
    epoch_rows: int = 10

    def __len__(self):
        return 1 << 40

    def __getitem__(self, index):
        return {"tokens": np.asarray([self.name, index])}


weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@given(weights, st.integers(1, 400))
@settings(max_examples=100, deadline=None)
def test_sources_give_their_shares_in_order(shares, count):
    mixed = MixedRows(tuple(Numbered(i) for i in range(len(shares))), tuple(shares), count)
    given_so_far = [0] * len(shares)
    for i in range(count):
        part, row = mixed.locate(i)
        assert row == given_so_far[part]
        assert mixed[i]["tokens"].tolist() == [part, row]
        given_so_far[part] += 1
    assert mixed.given(count) == given_so_far
    for got, share in zip(given_so_far, shares, strict=True):
        assert abs(got - count * share / sum(shares)) < len(shares)


def test_every_step_is_mixed():
    mixed = MixedRows((Numbered(0), Numbered(1)), (3.0, 1.0), 400)
    for step in range(100):
        names = [mixed[4 * step + i]["tokens"][0] for i in range(4)]
        assert sum(names) == 1


def _corpus(*sources):
    return Corpus(sources, np.ones(100_000, np.int32), SpecialTokens(0, PAD, PAD))


def test_a_corpus_mixes_by_weight_and_by_size_without_weights():
    big, small = Fake([30] * 30, [0] * 30), Fake([20] * 10, [0] * 10)
    cfg = DataConfig(row_length=ROW, packing="best_fit", pad_multiple=MULTIPLE)
    for weight, want in ((None, (30, 10)), (1.0, (20, 20))):
        corpus = _corpus(Source("big", big, big, weight), Source("small", small, small, weight))
        rows = corpus.training_rows(cfg, 40, 0)
        lengths = [int((rows[i]["segment_ids"] > 0).sum()) for i in range(40)]
        assert (lengths.count(32), lengths.count(20)) == want
        report = corpus.report(cfg)
        assert report["small"]["share"] == want[1] / 40 and report["big"]["rows"] == 30
        assert len(corpus.validation_batches(cfg, 4, 2)) == 2
    shares = [int((b.segment_ids > 0).sum()) for b in corpus.validation_batches(cfg, 20, 1)]
    assert (shares.count(32), shares.count(20)) == (10, 10)
    empty = Fake([], [])
    with pytest.raises(ValueError, match="data source none has no documents"):
        _corpus(Source("none", empty, empty)).training_rows(cfg, 1, 0)


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_each_source_plans_an_epoch_once(packing, count, monkeypatch):
    """Whatever the number of sources and of threads that read."""
    draw, drawn = np.random.default_rng, collections.Counter()

    def counting(seed):
        drawn[seed] += 1
        return draw(seed)

    monkeypatch.setattr(np.random, "default_rng", counting)
    documents = Fake([30] * 50, [0] * 50)
    corpus = _corpus(*(Source(str(i), documents, documents, 1.0) for i in range(count)))
    cfg = DataConfig(row_length=ROW, packing=packing, pad_multiple=MULTIPLE)
    rows = corpus.training_rows(cfg, 200 * count, 0)
    assert len(list(batches(rows, rows_per_step=count, first_step=0, prefetch=4))) == 200
    assert len(drawn) >= 4 and set(drawn.values()) == {count}


def test_batches_carry_weights_and_preferences_where_there_are_some():
    pairs = rows_of(Fake([11, 20], [2, 3], pairs=[6, 9], weighted=True), weighted=True)
    [batch] = list(batches(dataclasses.replace(pairs, num_rows=2), rows_per_step=2, first_step=0))
    assert batch.preference.shape == batch.loss_weights.shape == (2, ROW)
    plain = to_batch({k: v[None] for k, v in rows_of(Fake([11], [2]))[0].items()})
    assert plain.preference is None and plain.loss_weights is None
