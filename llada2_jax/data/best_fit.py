"""Best-fit packing: whole documents, each rounded up to a multiple of the block size.

Which sizes share a row is decided once, for all documents together; each epoch deals the documents
of a size anew to the places of that size, and shuffles the rows. So every epoch has the same number
of rows, the documents of a row change from epoch to epoch, and a row is a function of its number.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from typing import Any

import numpy as np

from llada2_jax.data.epochs import EpochPlans
from llada2_jax.data.packing import Documents


def pack(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Best fit decreasing.

    Args:
      sizes: how many items there are of size 0, 1, … capacity: int [capacity + 1].

    Returns: the row of each item (int64, largest items first), and the number of rows.
    """
    open_rows: dict[int, list[np.ndarray]] = {}  # by room left
    rooms: list[int] = []  # those that open_rows has, ascending
    placed: list[np.ndarray] = [np.zeros(0, np.int64)]
    rows = 0

    def leave(room: int, which: np.ndarray) -> None:
        if not (room and len(which)):
            return
        if room not in open_rows:
            bisect.insort(rooms, room)
        open_rows.setdefault(room, []).append(which)

    for size in (np.flatnonzero(sizes[1:]) + 1)[::-1].tolist():
        left = int(sizes[size])
        while left:
            tightest = bisect.bisect_left(rooms, size)
            if tightest == len(rooms):
                fresh = -(-left // (capacity // size))
                leave(capacity, np.arange(rows, rows + fresh))
                rows += fresh
            room = rooms.pop(tightest)
            # A row that has taken one is the tightest for the next: it takes all that fit.
            here, each = np.concatenate(open_rows.pop(room)), room // size
            used = here[: -(-left // each)]
            items = np.repeat(used, each)[:left]
            full = len(items) // each
            leave(room, here[len(used) :])
            leave(room - each * size, used[:full])
            leave(room - (len(items) - full * each) * size, used[full:])
            placed.append(items)
            left -= len(items)
    return np.concatenate(placed), rows


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What rows are made of: [start, stop) of a document, and its size in multiples."""

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    size: np.ndarray


@dataclasses.dataclass(frozen=True)
class BestFitRows:
    """Rows of whole documents; what does not fit is split or skipped, and counted.

    multiple: documents (each text of a pair) are rounded up to it, and so begin at multiples of
    it; row_length itself gives every document a row of its own. What is added are `pad` tokens that
    are supervised as the document's last token is; what is left of a row is in no segment.
    long_documents: "split" those beyond a row, "skip" them, or make them an "error"; pairs are
    never split.
    A pair is two segments next to each other with one document id. reference: fp32 [docs, 2],
    bounds of a reference model on both texts of each pair, which then are in the rows.
    """

    documents: Documents
    row_length: int
    num_rows: int
    seed: int
    pad: int
    multiple: int
    long_documents: str = "skip"
    shuffle: bool = True
    weighted: bool = False
    reference: np.ndarray | None = None
    _epochs: EpochPlans[tuple[np.ndarray, np.ndarray]] = dataclasses.field(
        default_factory=EpochPlans, init=False, repr=False, compare=False
    )

    def __post_init__(self):
        if self.row_length % self.multiple:
            raise ValueError(
                f"data.row_length={self.row_length} is not a multiple of "
                f"data.pad_multiple={self.multiple}"
            )

    def __len__(self) -> int:
        return self.num_rows

    @property
    def epoch_rows(self) -> int:
        return self._layout[2]

    @property
    def epoch_tokens(self) -> int:
        """Tokens of an epoch, without padding."""
        return int((self.pieces.stop - self.pieces.start).sum())

    def report(self) -> dict[str, float]:
        """documents; rows of an epoch; fill: share of a row that is documents, without padding;
        skipped: documents beyond a row (also those that only prompts would be left of); split:
        documents cut into several pieces; unsupervised: pieces before a document's first supervised
        token or after its last, left out.
        """
        _, skipped, split, unsupervised = self._cut
        return {
            "documents": len(self.documents.ids),
            "rows": self.epoch_rows,
            "fill": self.epoch_tokens / (self.epoch_rows * self.row_length),
            "skipped": skipped,
            "split": split,
            "unsupervised": unsupervised,
        }

    @property
    def pieces(self) -> Pieces:
        return self._cut[0]

    def _rounded(self, lengths: np.ndarray) -> np.ndarray:
        return -(-lengths // self.multiple)

    @functools.cached_property
    def _cut(self) -> tuple[Pieces, int, int, int]:
        """Pieces of all documents; how many documents are skipped, how many split, and how many
        pieces have nothing to learn in them or on one side of them."""
        lengths, chosen = self.documents.lengths, self.documents.chosen
        size = self._rounded(chosen) + self._rounded(lengths - chosen)
        long = size > self.row_length // self.multiple
        if long.any() and self.long_documents == "error":
            what = "pairs" if self.documents.paired else "documents"
            raise ValueError(
                f"{long.sum()} of {len(lengths)} {what} are longer than a row: "
                f"data.row_length={self.row_length}, the longest takes "
                f"{size.max() * self.multiple} tokens; raise it, or say what becomes of them in "
                "data.long_documents"
            )
        split = long & (chosen == 0) & (self.long_documents == "split")
        skipped = long & ~split
        count = np.where(skipped, 0, np.where(split, -(-lengths // self.row_length), 1))
        document = np.repeat(np.arange(len(lengths)), count)
        number = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
        start = number * self.row_length
        stop = np.minimum(start + self.row_length, lengths[document])
        stop = np.where(split[document], stop, lengths[document])
        learns = stop > self.documents.first_supervised[document]
        learns &= start < self.documents.supervised_end[document]
        document, start, stop = document[learns], start[learns], stop[learns]
        if not len(document):
            raise ValueError(
                f"no document fits a row: data.row_length={self.row_length}, shortest document "
                f"{min(lengths, default=0)} tokens; raise it, or split long documents "
                "(data.long_documents)"
            )
        first = np.minimum(chosen[document], stop)
        size = self._rounded(first) + self._rounded(stop - start - first)
        pieces = Pieces(document, start, stop, size)
        return pieces, int(skipped.sum()), int(split.sum()), int((~learns).sum())

    @functools.cached_property
    def _layout(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Places sorted by row, where each row's begin ([rows + 1]), and the number of rows. A
        place is a number in the order of pieces from large to small."""
        capacity = self.row_length // self.multiple
        row, rows = pack(np.bincount(self.pieces.size, minlength=capacity + 1), capacity)
        places = np.argsort(row, kind="stable")
        return places, np.searchsorted(row[places], np.arange(rows + 1)), rows

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The piece at each place, and the order of the rows, in an epoch."""
        order, rows = np.arange(len(self.pieces.size)), np.arange(self.epoch_rows)
        if self.shuffle:
            rng = np.random.default_rng((self.seed, 0, epoch))
            order, rows = rng.permutation(order), rng.permutation(rows)
        return order[np.argsort(-self.pieces.size[order], kind="stable")], rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The fields of types.Batch for one row, each [row_length]."""
        fields: dict[str, Any] = self._empty()
        at, epoch = 0, int(index) // self.epoch_rows
        for number, piece in enumerate(self._pieces_of(index), start=1):
            at = self._put(fields, at, int(piece), number, epoch)
        fields["positions"][at:] = np.arange(self.row_length - at)
        fields["loss_mask"] = fields["loss_weights"] > 0
        if not self.weighted:
            del fields["loss_weights"]
        if not self.documents.paired:
            del fields["preference"]
        if self.reference is None:
            del fields["reference"]
        return fields

    def documents_of(self, index: int) -> np.ndarray:
        """The documents of a row, in order: of pair n the texts are segments 2n - 1 and 2n."""
        return self.pieces.document[self._pieces_of(index)]

    def _pieces_of(self, index: int) -> np.ndarray:
        epoch, number = divmod(int(index), self.epoch_rows)
        dealt, order = self._epochs.get(epoch if self.shuffle else 0, self._epoch)
        places, starts, _ = self._layout
        row = int(order[number])
        return dealt[places[starts[row] : starts[row + 1]]]

    def _empty(self) -> dict[str, Any]:
        names = ("segment_ids", "positions", "document_ids", "document_positions", "visits")
        fields: dict[str, Any] = {n: np.zeros(self.row_length, np.int32) for n in names}
        fields["tokens"] = np.full(self.row_length, self.pad, np.int32)
        fields["loss_weights"] = np.zeros(self.row_length, np.float32)
        fields["preference"] = np.zeros(self.row_length, np.int32)
        fields["reference"] = np.zeros(self.row_length, np.float32)
        return fields

    def _put(self, fields: dict[str, Any], at: int, piece: int, number: int, epoch: int) -> int:
        """Writes a piece at offset `at`; returns where the next one begins."""
        document = int(self.pieces.document[piece])
        start, stop = int(self.pieces.start[piece]), int(self.pieces.stop[piece])
        tokens, weights = self.documents.read(document, start, stop)
        cut = int(self.documents.chosen[document])
        texts = [(tokens, weights, number, 0)]
        if cut:
            texts = [
                (tokens[:cut], weights[:cut], 2 * number - 1, 1),
                (tokens[cut:], weights[cut:], 2 * number, -1),
            ]
        for which, (text, loss, segment, preference) in enumerate(texts):
            size = -(-len(text) // self.multiple) * self.multiple
            span = slice(at, at + size)
            fields["tokens"][at : at + len(text)] = text
            fields["loss_weights"][span] = loss[-1]
            fields["loss_weights"][at : at + len(text)] = loss
            fields["segment_ids"][span] = segment
            fields["positions"][span] = np.arange(size)
            fields["document_positions"][span] = np.arange(start, start + size)
            fields["document_ids"][span] = self.documents.ids[document]
            fields["visits"][span] = epoch
            fields["preference"][span] = preference
            if self.reference is not None:
                fields["reference"][at] = self.reference[document, which]
            at += size
        return at
