"""Concatenate-and-split packing as a pure function of the row's number.

Epoch v is a permutation of the documents drawn from (seed, v); the epochs follow each other in one
endless stream of tokens, and row r is its r-th stretch of `row_length` tokens. So the position in
the data is one integer, and a row does not depend on who asks for it, or after what.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer

from llada2_jax.data.documents import Document


@dataclasses.dataclass(frozen=True)
class TokenizedDocuments:
    """tokens: all documents, one after the other. ids, offsets: of each ([docs], [docs + 1])."""

    tokens: np.ndarray
    ids: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def tokenize(
    documents: Iterable[Document], tokenizer: Tokenizer, *, eos: int, bos: int | None
) -> TokenizedDocuments:
    """Every document as [bos] text eos. Reserved tokens in the text are not given their ids."""
    documents = list(documents)
    if not documents:
        raise ValueError("no documents to tokenize: the source is empty for this split")
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    encodings = tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False)
    start = [] if bos is None else [bos]
    rows = [np.asarray(start + e.ids + [eos], np.int32) for e in encodings]
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    ids = np.asarray([d.id for d in documents], np.int32)
    return TokenizedDocuments(np.concatenate(rows), ids, offsets)


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Random access to rows of the endless stream; what grain's MapDataset reads.

    shuffle=False keeps the documents' order (validation). document_mask=False makes a row one
    segment with running positions. random_length_fraction: share of rows cut in two at a random
    point, so that shorter contexts are seen (paper §4.2). `bos`
    opens a document and nothing predicts it.
    """

    documents: TokenizedDocuments
    row_length: int
    num_rows: int
    seed: int
    bos: int | None
    shuffle: bool = True
    document_mask: bool = True
    random_length_fraction: float = 0.0

    def __len__(self) -> int:
        return self.num_rows

    @property
    def epoch_tokens(self) -> int:
        return int(self.documents.offsets[-1])

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
        fields["loss_mask"] = np.ones(self.row_length, bool)
        if self.bos is not None:
            fields["loss_mask"] = fields["tokens"] != self.bos
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
            order, ends = self._epoch(epoch if self.shuffle else 0)
            slot = int(np.searchsorted(ends, offset, side="right"))
            document = order[slot]
            size = int(self.documents.lengths[document])
            inside = offset - (int(ends[slot]) - size)
            take = min(size - inside, end - start)
            first = int(self.documents.offsets[document]) + inside
            yield {
                "tokens": self.documents.tokens[first : first + take],
                "document_ids": np.full(take, self.documents.ids[document], np.int32),
                "document_positions": np.arange(inside, inside + take, dtype=np.int32),
                "visits": np.full(take, epoch, np.int32),
            }
            start += take

    @functools.lru_cache(maxsize=2)  # noqa: B019 - as long-lived as the source itself
    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the documents in an epoch, and where each ends in it."""
        count = len(self.documents.ids)
        order = np.arange(count)
        if self.shuffle:
            order = np.random.default_rng((self.seed, 0, epoch)).permutation(count)
        return order, np.cumsum(self.documents.lengths[order])

    def __hash__(self) -> int:
        return id(self)
