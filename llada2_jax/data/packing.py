"""Concatenate-and-split packing as a pure function of the row's number.

Epoch v is a permutation of the documents drawn from (seed, v); the epochs follow each other in one
endless stream of tokens, and row r is its r-th stretch of `row_length` tokens. So the position in
the data is one integer, and a row does not depend on who asks for it, or after what.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from llada2_jax import progress
from llada2_jax.data.documents import Document
from llada2_jax.data.epochs import EpochPlans
from llada2_jax.data.tokenizer import whole_tokenizer


class Documents(Protocol):
    """Random access to tokenized documents, which is all that packing asks for.

    ids: int32 [docs]. lengths: int64 [docs], in tokens. chosen: int64 [docs], length of the first
    of two texts (a preference pair), or 0. first_supervised: int64 [docs], offset of the first
    token with a loss weight. supervised_end: int64 [docs], offset after the last one. digest:
    SHA-256 of all the documents, in hexadecimal. weighted: whether there are weights other than 0
    and 1. paired: whether the documents are pairs.
    """

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def lengths(self) -> np.ndarray: ...
    @property
    def chosen(self) -> np.ndarray: ...
    @property
    def first_supervised(self) -> np.ndarray: ...
    @property
    def supervised_end(self) -> np.ndarray: ...
    @property
    def digest(self) -> str: ...
    @property
    def weighted(self) -> bool: ...
    @property
    def paired(self) -> bool: ...

    def read(self, document: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int32) and loss weights (fp32) of [start, stop) of a document."""
        ...


@dataclasses.dataclass(frozen=True)
class TokenizedDocuments:
    """Documents in memory. tokens: all of them, one after the other. ids, offsets: of each ([docs],
    [docs + 1])."""

    tokens: np.ndarray
    ids: np.ndarray
    offsets: np.ndarray
    weighted = False
    paired = False

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def chosen(self) -> np.ndarray:
        return np.zeros(len(self.ids), np.int64)

    @property
    def first_supervised(self) -> np.ndarray:
        return np.zeros(len(self.ids), np.int64)

    @property
    def supervised_end(self) -> np.ndarray:
        return self.lengths

    @property
    def digest(self) -> str:
        total = hashlib.sha256()
        for array in (self.tokens, self.ids, self.offsets):
            total.update(np.ascontiguousarray(array).data)
        return total.hexdigest()

    def read(self, document: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        first = int(self.offsets[document])
        return self.tokens[first + start : first + stop], np.ones(stop - start, np.float32)


def tokenize(
    documents: Iterable[Document], tokenizer: Tokenizer, *, eos: int, bos: int | None
) -> TokenizedDocuments:
    """Every document as [bos] text eos. Reserved tokens in the text are not given their ids."""
    documents = list(documents)
    if not documents:
        raise ValueError("no documents to tokenize: the source is empty for this split")
    tokenizer = whole_tokenizer(tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    start, rows = [] if bos is None else [bos], []
    with progress.bar(what="tokenizing", total=len(documents), unit="document") as bar:
        for batch in itertools.batched(documents, 256):  # of texts that are encoded in parallel
            encodings = tokenizer.encode_batch([d.text for d in batch], add_special_tokens=False)
            rows += [np.asarray(start + e.ids + [eos], np.int32) for e in encodings]
            bar.update(len(batch))
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    ids = np.asarray([d.id for d in documents], np.int32)
    return TokenizedDocuments(np.concatenate(rows), ids, offsets)


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Random access to rows of the endless stream; what grain's MapDataset reads.

    shuffle=False keeps the documents' order (validation). document_mask=False makes a row one
    segment with running positions. random_length_fraction: share of rows cut in two at a random
    point, so that shorter contexts are seen (paper §4.2). `bos` opens a document and nothing
    predicts it. weighted: rows have loss_weights.
    """

    documents: Documents
    row_length: int
    num_rows: int
    seed: int
    bos: int | None
    shuffle: bool = True
    document_mask: bool = True
    random_length_fraction: float = 0.0
    weighted: bool = False
    _epochs: EpochPlans[tuple[np.ndarray, np.ndarray]] = dataclasses.field(
        default_factory=EpochPlans, init=False, repr=False, compare=False
    )

    def __len__(self) -> int:
        return self.num_rows

    @functools.cached_property
    def epoch_tokens(self) -> int:
        return int(self._lengths.sum())

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        return self.documents.lengths

    @property
    def epoch_rows(self) -> int:
        """Whole rows that an epoch fills."""
        return self.epoch_tokens // self.row_length

    def report(self) -> dict[str, float]:
        """documents, rows of an epoch, and the share of a row that is documents."""
        return {"documents": len(self.documents.ids), "rows": self.epoch_rows, "fill": 1.0}

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The fields of types.Batch for one row, each [row_length]."""
        row = int(index)
        pieces = list(self._pieces(row * self.row_length))
        fields = {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}
        segments = np.repeat(np.arange(1, len(pieces) + 1), [len(p["tokens"]) for p in pieces])
        if not self.document_mask:
            segments = np.ones_like(segments)
        segments = self._random_cut(row, segments)
        starts = np.flatnonzero(np.diff(segments, prepend=-1))
        sizes = np.diff(starts, append=self.row_length)
        fields["segment_ids"] = np.repeat(np.arange(1, len(starts) + 1), sizes).astype(np.int32)
        fields["positions"] = np.arange(self.row_length, dtype=np.int32)
        fields["positions"] -= np.repeat(starts, sizes).astype(np.int32)
        if self.bos is not None:
            fields["loss_weights"] *= fields["tokens"] != self.bos
        fields["loss_mask"] = fields["loss_weights"] > 0
        if not self.weighted:
            del fields["loss_weights"]
        return fields

    def _random_cut(self, row: int, segments: np.ndarray) -> np.ndarray:
        if not self.random_length_fraction:
            return segments
        rng = np.random.default_rng((self.seed, 1, row))
        if rng.random() >= self.random_length_fraction:
            return segments
        cut = rng.integers(1, self.row_length)
        return segments * 2 + (np.arange(self.row_length) >= cut)

    def _pieces(self, start: int):
        """The stretches of documents that fill [start, start + row_length) of the stream."""
        end = start + self.row_length
        while start < end:
            epoch, offset = divmod(start, self.epoch_tokens)
            order, ends = self._epochs.get(epoch if self.shuffle else 0, self._epoch)
            slot = int(np.searchsorted(ends, offset, side="right"))
            document = int(order[slot])
            size = int(self._lengths[document])
            inside = offset - (int(ends[slot]) - size)
            take = min(size - inside, end - start)
            tokens, weights = self.documents.read(document, inside, inside + take)
            yield {
                "tokens": tokens,
                "loss_weights": weights,
                "document_ids": np.full(take, self.documents.ids[document], np.int32),
                "document_positions": np.arange(inside, inside + take, dtype=np.int32),
                "visits": np.full(take, epoch, np.int32),
            }
            start += take

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the documents in an epoch, and where each ends in it."""
        count = len(self.documents.ids)
        order = np.arange(count)
        if self.shuffle:
            order = np.random.default_rng((self.seed, 0, epoch)).permutation(count)
        return order, np.cumsum(self._lengths[order])
