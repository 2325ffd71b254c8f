"""From rows to examples, by what the rows hold."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from llada2_jax.data.chat import LLADA2_TEMPLATE, ChatTemplate, ChatTokens, template_of
from llada2_jax.data.examples import BadRow, Encoder, Example, short
from llada2_jax.data.preferences import PreferencePairs
from llada2_jax.data.tokenizer import encode_text, vocab_size, whole_tokenizer
from llada2_jax.types import SpecialTokens

_CHAT = ("template", "today", "loss_turns", "system")
# Fields of EncodeOptions that are for some contents only.
_READ = {
    "text": ("field", "prompt_field", "bos"),
    "tokens": ("field", "prompt_field"),
    "chat": _CHAT,
    "preference": ("prompt_field", *_CHAT),
}
CONTENTS = tuple(_READ)


@dataclasses.dataclass(frozen=True)
class EncodeOptions:
    """content: what rows hold, one of CONTENTS. field: of "text" and "tokens" (empty: that name).
    prompt_field: of what stands before it and is not learned (empty: nothing does; the prompt of
    pairs: "prompt").
    template: "tokenizer" (its own), "llada2" (built in) or Jinja text. today: for templates that
    write a date. loss_turns: "all" assistant turns or the "last". system: opens conversations that
    have no system message. bos: open texts with the bos token, if there is one. row_length: longest
    prompt that leaves something to learn in a row; 0: any.

    Raises: ValueError that names a field, also one that is set and that the content does not read.
    """

    content: str = "text"
    field: str = ""
    prompt_field: str = ""
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
        if self.today:
            datetime.date.fromisoformat(self.today)
        of_some = {name for names in _READ.values() for name in names}
        for field in dataclasses.fields(self):
            value, unread = getattr(self, field.name), of_some.difference(_READ[self.content])
            if field.name in unread and value != field.default:
                raise ValueError(
                    f"{field.name}={value!r}: of rows with content={self.content!r} nothing reads "
                    "it; leave it out"
                )


def make_encoder(
    options: EncodeOptions, tokenizer_files: dict[str, str], special: SpecialTokens
) -> Encoder:
    """The function from a row to an Example. Raises: ValueError for options that do not fit."""
    tokenizer = whole_tokenizer(tokenizer_files["tokenizer.json"])
    if options.content == "text":
        encode = TextRows(options, tokenizer, special)
    elif options.content == "tokens":
        encode = TokenRows(options, vocab_size(tokenizer), special)
    else:
        encode = _chat_encoder(options, tokenizer_files, tokenizer, special)
    return WithinRow(encode, options.row_length) if options.row_length else encode


def _chat_encoder(options: EncodeOptions, tokenizer_files, tokenizer, special) -> Encoder:
    chat = ChatTokens(
        _template(options, tokenizer_files, tools=False),
        _template(options, tokenizer_files, tools=True),
        tokenizer,
        special.eos,
        tokenizer.id_to_token(special.mask) or "",
        options.loss_turns,
        options.system,
    )
    if options.content == "chat":
        return chat
    return PreferencePairs(chat, options.prompt_field or "prompt")


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
    """[bos] [prompt] text eos, text and eos supervised. Names of special tokens in a text stay
    text, but for the mask's, which no text should hold."""

    def __init__(self, options: EncodeOptions, tokenizer: Tokenizer, special: SpecialTokens):
        self._field, self._prompt_field = options.field or "text", options.prompt_field
        self._start = [special.bos] if options.bos and special.bos is not None else []
        self._eos, self._mask = special.eos, tokenizer.id_to_token(special.mask)
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True

    def __call__(self, row: dict[str, Any]) -> Example:
        prompt = self._start
        if self._prompt_field:
            prompt = [*prompt, *self._encode(row, self._prompt_field)]
        ids = [*self._encode(row, self._field), self._eos]
        return _learned_after(np.asarray([*prompt, *ids], np.int32), len(prompt))

    def _encode(self, row: dict[str, Any], field: str) -> list[int]:
        text = row.get(field)
        if not isinstance(text, str):
            raise BadRow("wrong_type", f"{field}={short(text)} is no text")
        if not text.strip():
            raise BadRow("empty", f"{field} is empty")
        if self._mask and self._mask in text:
            raise BadRow("mask_token", f"{field} holds {self._mask!r}")
        return encode_text(self._tokenizer, text)


def _learned_after(tokens: np.ndarray, prompt: int) -> Example:
    return Example(tokens, (np.arange(len(tokens)) >= prompt).astype(np.float32))


class TokenRows:
    """Ids as they are; optional "loss_mask": numbers from 0, one for each id of `field`. Without
    one, all of them are supervised but bos."""

    def __init__(self, options: EncodeOptions, vocab_size: int, special: SpecialTokens):
        self._field, self._prompt_field = options.field or "tokens", options.prompt_field
        self._vocab_size, self._mask, self._bos = vocab_size, special.mask, special.bos

    def __call__(self, row: dict[str, Any]) -> Example:
        ids = self._ids(row, self._field)
        weights = self._weights(row, ids)
        if self._prompt_field:
            prompt = self._ids(row, self._prompt_field)
            ids = np.concatenate([prompt, ids])
            weights = np.concatenate([np.zeros(len(prompt), np.float32), weights])
        return Example(ids, weights)

    def _ids(self, row: dict[str, Any], field: str) -> np.ndarray:
        ids = _numbers(row.get(field), field)
        if not len(ids):
            raise BadRow("empty", f"{field} is empty")
        if ids.dtype.kind not in "iu":
            raise BadRow("wrong_type", f"{field} holds numbers that are no integers")
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            wrong = ids[(ids < 0) | (ids >= self._vocab_size)][0]
            raise BadRow("id_out_of_range", f"id {wrong}, vocabulary of {self._vocab_size}")
        if (ids == self._mask).any():
            raise BadRow("mask_token", f"{field} holds the mask's id {self._mask}")
        return ids.astype(np.int32)

    def _weights(self, row: dict[str, Any], ids: np.ndarray) -> np.ndarray:
        if row.get("loss_mask") is None:
            return (ids != self._bos).astype(np.float32)
        with np.errstate(over="ignore"):  # to infinity, which is refused below
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
        raise BadRow("wrong_type", f"{field}={short(value)} is no list of numbers")
    return np.asarray(value) if value else np.zeros(0, np.int64)


@dataclasses.dataclass(frozen=True)
class WithinRow:
    """Refuses examples whose prompt leaves nothing to learn within `row_length` tokens. The texts
    of a pair share a row, so they have that many together."""

    encode: Encoder
    row_length: int

    def __call__(self, row: dict[str, Any]) -> Example:
        example = self.encode(row)
        prompts = [text.first_supervised for text in example.texts()]
        if sum(prompts) + len(prompts) > self.row_length:  # a token to learn in each
            raise BadRow(
                "prompt_fills_row",
                f"the prompt has {' and '.join(map(str, prompts))} tokens, a row {self.row_length}",
            )
        return example
