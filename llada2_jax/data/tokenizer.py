"""Byte-level BPE with LLaDA2's reserved tokens, trained by `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from llada2_jax import progress
from llada2_jax.data.examples import BadRow

MASK, EOS, BOS = "<|mask|>", "<|endoftext|>", "<|startoftext|>"
ROLES = ("<role>", "</role>", "<|role_end|>")
RESERVED = (MASK, EOS, BOS, *ROLES)

# Line breaks take the indentation along, since in Python the two mean one thing.
_WORDS = r"\n+[ \t]*| ?[A-Za-z_]+| ?[0-9]{1,3}| ?[^\sA-Za-z_0-9]+|[ \t]+(?=[ \t])|\s"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` ids, the reserved ones first.

    Merging takes minutes for large corpora; its progress is the library's own bars.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(RESERVED),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress.shown(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """The files that transformers reads, by name."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "mask_token": MASK,
        "eos_token": EOS,
        "pad_token": EOS,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(settings, indent=1),
    }


def whole_tokenizer(text: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json, without the truncation and padding that it may ask for:
    they are for batches of another program, and would lose text here."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text. Raises: BadRow("not_utf8") for lone surrogates, which JSON can spell."""
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except (TypeError, UnicodeEncodeError):
        raise BadRow("not_utf8", "the text holds a surrogate without its partner") from None


def vocab_size(tokenizer: Tokenizer) -> int:
    """All ids are below it: more than there are entries where the vocabulary has holes."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """int32 [V]: bytes of text each id stands for; 0 for reserved ids.

    In a byte-level vocabulary every character of an entry is one byte.
    """
    lengths = np.zeros(vocab_size(tokenizer), np.int32)
    special = set(tokenizer.get_added_tokens_decoder())
    for entry, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if index in special else len(entry)
    return lengths
