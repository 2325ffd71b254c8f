"""Tokenized documents of both splits, ready to be packed."""

from __future__ import annotations

import dataclasses

import numpy as np
from tokenizers import Tokenizer

from llada2_jax.config import DataConfig
from llada2_jax.data.documents import documents
from llada2_jax.data.loader import validation_batches
from llada2_jax.data.packing import PackedRows, TokenizedDocuments, tokenize
from llada2_jax.data.tokenizer import token_byte_lengths
from llada2_jax.types import Batch, SpecialTokens


@dataclasses.dataclass(frozen=True)
class Corpus:
    """train, validation: tokenized documents. token_bytes: int32 [V], bytes an id stands for."""

    train: TokenizedDocuments
    validation: TokenizedDocuments
    token_bytes: np.ndarray
    special: SpecialTokens

    def training_rows(self, cfg: DataConfig, num_rows: int, seed: int) -> PackedRows:
        """The first `num_rows` rows of the shuffled, endless stream."""
        return PackedRows(
            self.train,
            cfg.row_length,
            num_rows,
            seed,
            self.special.bos,
            document_mask=cfg.document_mask,
            random_length_fraction=cfg.random_length_fraction,
        )

    def validation_batches(self, row_length: int, num_rows: int, rows_per_step: int) -> list[Batch]:
        """Fixed rows for scoring. The first token of each segment is not scored: an autoregressive
        model has nothing to predict it from, and both kinds of model answer for the same bytes."""
        rows = PackedRows(self.validation, row_length, 1, 0, self.special.bos, shuffle=False)
        return [
            dataclasses.replace(b, loss_mask=b.loss_mask & (b.positions > 0))
            for b in validation_batches(rows, num_rows=num_rows, rows_per_step=rows_per_step)
        ]


def load_corpus(cfg: DataConfig, tokenizer: Tokenizer, special: SpecialTokens) -> Corpus:
    """Reads and tokenizes the configured source (a pass over tens of MB takes some seconds)."""
    splits = {
        split: tokenize(documents(cfg.source, split), tokenizer, eos=special.eos, bos=special.bos)
        for split in ("train", "validation")
    }
    return Corpus(**splits, token_bytes=token_byte_lengths(tokenizer), special=special)
