"""What one row of a source becomes: token ids, what their loss weighs, and where a pair divides."""

from __future__ import annotations

import dataclasses
import reprlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

# Why a row cannot be used. The manifest counts rows by these names.
BAD_ROW_KINDS = {
    "not_json": "the line is not a JSON object; a row is one line",
    "not_utf8": "the text is not valid Unicode",
    "wrong_type": "a field is missing or of another type than the content asks for",
    "empty": "there is no text",
    "no_assistant_turn": "no message is from the assistant, or none has a weight",
    "two_systems": "the row's system prompt is not the one that opens its messages",
    "template": "the chat template refuses the messages, or cannot say where turns begin",
    "prompt_fills_row": "no supervised token lies within a row",
    "id_out_of_range": "a token id is negative or beyond the vocabulary",
    "mask_token": "the text or the ids hold the mask token",
    "special_token": "a message's text holds another special token",
    "same_answers": "chosen and rejected are equal",
}


class BadRow(ValueError):
    """A row that cannot be used. kind: a name of BAD_ROW_KINDS."""

    def __init__(self, kind: str, message: str):
        if kind not in BAD_ROW_KINDS:
            raise KeyError(f"{kind!r} is not a kind of bad row: {', '.join(BAD_ROW_KINDS)}")
        super().__init__(message)
        self.kind = kind


# Values of rows are of any size, and nested deeper than repr goes.
_short = reprlib.Repr(maxlevel=2, maxstring=60, maxlong=60)


def short(value: Any) -> str:
    """The value in a message: its beginning, 60 characters at most."""
    text = _short.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclasses.dataclass(frozen=True)
class Example:
    """tokens: int32 [n]. weights: fp32 [n], of each token's loss; 0 is not supervised. chosen: a
    preference pair is two texts one after the other, and the first has this many tokens; 0: one
    text."""

    tokens: np.ndarray
    weights: np.ndarray
    chosen: int = 0

    def texts(self) -> list[Example]:
        """Both texts of a pair, else the one there is."""
        if not self.chosen:
            return [self]
        cut = self.chosen
        return [
            Example(self.tokens[:cut], self.weights[:cut]),
            Example(self.tokens[cut:], self.weights[cut:]),
        ]

    @property
    def first_supervised(self) -> int:
        """Offset of the first token with a weight; the length if there is none."""
        at = np.flatnonzero(self.weights)
        return int(at[0]) if len(at) else len(self.tokens)

    @property
    def supervised_end(self) -> int:
        """Offset after the last token with a weight; 0 if there is none."""
        at = np.flatnonzero(self.weights)
        return int(at[-1]) + 1 if len(at) else 0


Encoder = Callable[[dict[str, Any]], Example]
"""Maps a row to an Example; raises BadRow."""

_HEADER = struct.Struct("<II")  # tokens, runs of equal weight


def encode_record(example: Example, dtype: np.dtype) -> bytes:
    """Tokens as `dtype` (little endian), weights as runs of (end, weight)."""
    weights = example.weights.astype("<f4")
    ends = np.append(np.flatnonzero(np.diff(weights)) + 1, len(weights))
    return b"".join(
        [
            _HEADER.pack(len(example.tokens), len(ends)),
            ends.astype("<u4").tobytes(),
            weights[ends - 1].tobytes(),
            example.tokens.astype(dtype).tobytes(),
        ]
    )


def decode_record(record: bytes, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32, weights fp32) of `encode_record`.

    Raises: ValueError for bytes that are no record.
    """
    size, runs = _HEADER.unpack_from(record) if len(record) >= _HEADER.size else (0, 0)
    at = _HEADER.size + 8 * runs
    if not runs or len(record) != at + size * dtype.itemsize:
        raise ValueError(f"not a record of tokens: {len(record)} bytes, {size} tokens announced")
    ends = np.frombuffer(record, "<u4", runs, _HEADER.size).astype(np.int64)
    weights = np.frombuffer(record, "<f4", runs, _HEADER.size + 4 * runs)
    sizes = ends.copy()
    sizes[1:] -= ends[:-1]
    if ends[-1] != size or (sizes < 0).any():
        raise ValueError(f"not a record of tokens: runs of weights end at {ends[-1]}, not {size}")
    tokens = np.frombuffer(record, dtype, size, at).astype(np.int32)
    return tokens, np.repeat(weights, sizes)
