"""From rows to examples, by what the rows hold."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from llada2_jax.data.chat import LLADA2_TEMPLATE, ChatTemplate, ChatTokens, template_of
from llada2_jax.data.examples import BadRow, Encoder, Example
from llada2_jax.data.preferences import PreferencePairs
from llada2_jax.data.tokenizer import encode_text
from llada2_jax.types import SpecialTokens

CONTENTS = ("text", "tokens", "chat", "preference")


@dataclasses.dataclass(frozen=True)
class EncodeOptions:
    """content: what rows hold, one of CONTENTS. field: of "text" and "tokens" (empty: that name).
    template: "tokenizer" (its own), "llada2" (built in) or Jinja text. today: for templates that
    write a date. loss_turns: "all" assistant turns or the "last". system: opens conversations that
    have no system message. bos: open texts with the bos token, if there is one. row_length: longest
    prompt that leaves something to learn in a row; 0: any."""

    content: str = "text"
    field: str = ""
    template: str = "tokenizer"
    today: str = ""
    loss_turns: str = "all"
    system: str = ""
    bos: bool = True
    row_length: int = 0

    def __post_init__(self):
        for name, choices in (("content", CONTENTS), ("loss_turns", ("all", "last"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {choices}")


def make_encoder(
    options: EncodeOptions, tokenizer_files: dict[str, str], special: SpecialTokens
) -> Encoder:
    """The function from a row to an Example. Raises: ValueError for options that do not fit."""
    tokenizer = Tokenizer.from_str(tokenizer_files["tokenizer.json"])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    field = options.field or options.content
    if options.content == "text":
        return TextRows(field, tokenizer, special, special.bos if options.bos else None)
    if options.content == "tokens":
        return TokenRows(field, tokenizer.get_vocab_size(), special)
    chat = ChatTokens(
        _template(options, tokenizer_files, tools=False),
        _template(options, tokenizer_files, tools=True),
        tokenizer,
        special.eos,
        tokenizer.id_to_token(special.mask) or "",
        options.loss_turns,
        options.system,
    )
    encode = chat if options.content == "chat" else PreferencePairs(chat)
    return WithinRow(encode, options.row_length) if options.row_length else encode


def _template(
    options: EncodeOptions, tokenizer_files: dict[str, str], *, tools: bool
) -> ChatTemplate:
    if options.template == "tokenizer":
        template = template_of(tokenizer_files, tools=tools)
    elif options.template == "llada2":
        template = ChatTemplate(LLADA2_TEMPLATE)
    else:
        template = ChatTemplate(options.template)
    return dataclasses.replace(template, today=options.today)


class TextRows:
    """[bos] text eos, all of it supervised but bos. Names of special tokens in a text stay text,
    but for the mask's, which no text should hold."""

    def __init__(self, field: str, tokenizer: Tokenizer, special: SpecialTokens, bos: int | None):
        self._field, self._bos, self._eos = field, bos, special.eos
        self._mask = tokenizer.id_to_token(special.mask)
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True

    def __call__(self, row: dict[str, Any]) -> Example:
        text = row.get(self._field)
        if not isinstance(text, str):
            raise BadRow("wrong_type", f"{self._field}={_short(text)} is no text")
        if not text.strip():
            raise BadRow("empty", f"{self._field} is empty")
        if self._mask and self._mask in text:
            raise BadRow("mask_token", f"{self._field} holds {self._mask!r}")
        ids = encode_text(self._tokenizer, text)
        start = [] if self._bos is None else [self._bos]
        tokens = np.asarray([*start, *ids, self._eos], np.int32)
        weights = np.ones(len(tokens), np.float32)
        weights[: len(start)] = 0
        return Example(tokens, weights)


class TokenRows:
    """Ids as they are, under `field`; optional "loss_mask": numbers from 0, one a token."""

    def __init__(self, field: str, vocab_size: int, special: SpecialTokens):
        self._field, self._vocab_size, self._mask = field, vocab_size, special.mask
        self._bos = special.bos

    def __call__(self, row: dict[str, Any]) -> Example:
        ids = _numbers(row.get(self._field), self._field)
        if not len(ids):
            raise BadRow("empty", f"{self._field} is empty")
        if ids.dtype.kind not in "iu":
            raise BadRow("wrong_type", f"{self._field} holds numbers that are no integers")
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            wrong = ids[(ids < 0) | (ids >= self._vocab_size)][0]
            raise BadRow("id_out_of_range", f"id {wrong}, vocabulary of {self._vocab_size}")
        if (ids == self._mask).any():
            raise BadRow("mask_token", f"{self._field} holds the mask's id {self._mask}")
        return Example(ids.astype(np.int32), self._weights(row, ids))

    def _weights(self, row: dict[str, Any], ids: np.ndarray) -> np.ndarray:
        if row.get("loss_mask") is None:
            return (ids != self._bos).astype(np.float32)
        weights = _numbers(row["loss_mask"], "loss_mask").astype(np.float32)
        if weights.shape != ids.shape or not np.isfinite(weights).all() or (weights < 0).any():
            raise BadRow("wrong_type", f"loss_mask is not {len(ids)} numbers from 0")
        if not weights.any():
            raise BadRow("no_assistant_turn", "loss_mask is 0 everywhere")
        return weights


def _numbers(value: Any, field: str) -> np.ndarray:
    numeric = isinstance(value, list | tuple) and all(
        isinstance(v, int | float) and not (isinstance(v, int) and abs(v) >= 2**63) for v in value
    )
    if not numeric:
        raise BadRow("wrong_type", f"{field}={_short(value)} is no list of numbers")
    return np.asarray(value) if value else np.zeros(0, np.int64)


@dataclasses.dataclass(frozen=True)
class WithinRow:
    """Refuses examples whose prompt leaves nothing to learn within `row_length` tokens."""

    encode: Encoder
    row_length: int

    def __call__(self, row: dict[str, Any]) -> Example:
        example = self.encode(row)
        if example.first_supervised >= self.row_length:
            raise BadRow(
                "prompt_fills_row",
                f"the prompt has {example.first_supervised} tokens, a row {self.row_length}",
            )
        return example


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
