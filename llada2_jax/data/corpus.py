"""The documents of a run, and the rows and batches made of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from llada2_jax.config import DataConfig
from llada2_jax.data.best_fit import BestFitRows
from llada2_jax.data.documents import documents
from llada2_jax.data.loader import validation_batches
from llada2_jax.data.mixing import MixedRows, Rows, ShuffledRows
from llada2_jax.data.packing import Documents, PackedRows, tokenize
from llada2_jax.data.prepare import tokenizer_hash
from llada2_jax.data.prepared import PreparedDocuments, PreparedError
from llada2_jax.data.tokenizer import token_byte_lengths
from llada2_jax.types import Batch, SpecialTokens

SourceRows = PackedRows | BestFitRows


@dataclasses.dataclass(frozen=True)
class Source:
    """Tokenized documents of both splits, and the share of rows they get among the sources (None:
    as many as they fill, so that every source lasts equally long). reference: see BestFitRows, for
    the training split."""

    name: str
    train: Documents
    validation: Documents
    weight: float | None = None
    reference: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Corpus:
    """sources: what is mixed. token_bytes: int32 [V], bytes an id stands for."""

    sources: tuple[Source, ...]
    token_bytes: np.ndarray
    special: SpecialTokens

    def training_rows(self, cfg: DataConfig, num_rows: int, seed: int) -> Rows:
        """The first `num_rows` rows of the shuffled, mixed, endless stream."""
        parts = [self._rows(s, s.train, cfg, num_rows, seed) for s in self.sources]
        shuffled = [ShuffledRows(p, seed) if isinstance(p, PackedRows) else p for p in parts]
        if len(parts) == 1:
            return shuffled[0]
        return MixedRows(tuple(shuffled), self._weights(parts), num_rows)

    def validation_batches(self, cfg: DataConfig, num_rows: int, rows_per_step: int) -> list[Batch]:
        """Fixed rows for scoring, of each source its share, without loss weights. The first token
        of each segment is not scored: an autoregressive model has nothing to predict it from, and
        both kinds of model answer for the same bytes."""
        plain = dataclasses.replace(cfg, document_mask=True, random_length_fraction=0.0)
        parts = [
            self._rows(s, s.validation, plain, num_rows, 0, shuffle=False) for s in self.sources
        ]
        weights = self._weights(parts)
        counts = MixedRows(tuple(parts), weights, num_rows).given(num_rows)
        chosen = list(zip(parts, counts, strict=True))
        return [
            dataclasses.replace(b, loss_mask=b.loss_mask & (b.positions > 0), loss_weights=None)
            for b in validation_batches(chosen, num_rows=num_rows, rows_per_step=rows_per_step)
        ]

    def pairs(self, cfg: DataConfig) -> list[BestFitRows]:
        """Each source's preference pairs for training as rows, in their order."""
        rows = [self._rows(s, s.train, cfg, 1, 0, shuffle=False) for s in self.sources]
        return [part for part in rows if isinstance(part, BestFitRows)]

    def report(self, cfg: DataConfig) -> dict[str, dict[str, Any]]:
        """By source: documents, rows of an epoch, fill ratio and what did not fit (see the rows'
        `report`), and the share of rows it gets."""
        parts = [self._rows(s, s.train, cfg, 1, 0) for s in self.sources]
        shares = np.asarray(self._weights(parts)) / sum(self._weights(parts))
        return {
            s.name: {**part.report(), "share": float(share)}
            for s, part, share in zip(self.sources, parts, shares, strict=True)
        }

    def description(self, cfg: DataConfig) -> dict[str, dict[str, Any]]:
        """`report`, and how prepared data was made: its manifest but for single rows and files."""
        described = self.report(cfg)
        for source in self.sources:
            if isinstance(source.train, PreparedDocuments):
                manifest = source.train.manifest.items()
                kept = {k: v for k, v in manifest if k not in ("bad_examples", "shards")}
                described[source.name]["manifest"] = kept
        return described

    def digests(self) -> dict[str, str]:
        """By source and split: SHA-256 of the documents, wherever they are."""
        return {
            f"{source.name} ({split})": documents.digest
            for source in self.sources
            for split, documents in (("train", source.train), ("validation", source.validation))
        }

    def _weights(self, parts: list[SourceRows]) -> tuple[float, ...]:
        return tuple(
            float(max(part.epoch_rows, 1)) if source.weight is None else source.weight
            for source, part in zip(self.sources, parts, strict=True)
        )

    def _rows(
        self,
        source: Source,
        documents: Documents,
        cfg: DataConfig,
        num_rows: int,
        seed: int,
        *,
        shuffle: bool = True,
    ) -> SourceRows:
        """Rows of one source under the configured packing."""
        if not len(documents.ids):
            raise ValueError(f"data source {source.name} has no documents in one of its splits")
        weighted = any(s.train.weighted or s.validation.weighted for s in self.sources)
        if cfg.packing == "best_fit":
            return BestFitRows(
                documents,
                cfg.row_length,
                num_rows,
                seed,
                self.special.pad,
                cfg.pad_multiple,
                cfg.long_documents,
                shuffle,
                weighted,
                source.reference if documents is source.train else None,
            )
        return PackedRows(
            documents,
            cfg.row_length,
            num_rows,
            seed,
            self.special.bos,
            shuffle,
            document_mask=cfg.document_mask,
            random_length_fraction=cfg.random_length_fraction,
            weighted=weighted,
        )


def load_corpus(cfg: DataConfig, tokenizer: Tokenizer, special: SpecialTokens) -> Corpus:
    """The configured sources: prepared folders, or else data.source, which is read and tokenized
    now (a pass over tens of MB takes some seconds).

    Raises: ValueError for sources that are not there or do not fit the tokenizer or each other.
    """
    if cfg.sources:
        sources = _prepared_sources(cfg, tokenizer, special)
    else:
        train, validation = (
            tokenize(documents(cfg.source, split), tokenizer, eos=special.eos, bos=special.bos)
            for split in ("train", "validation")
        )
        sources = (Source(cfg.source, train, validation),)
    return Corpus(sources, token_byte_lengths(tokenizer), special)


def _prepared_sources(
    cfg: DataConfig, tokenizer: Tokenizer, special: SpecialTokens
) -> tuple[Source, ...]:
    digest = tokenizer_hash(tokenizer.to_str())

    def read(folder: str, split: str) -> PreparedDocuments:
        documents = PreparedDocuments(folder, split, cfg.retry_seconds)
        _check_fit(folder, documents.manifest, digest, special)
        return documents

    sources = tuple(
        Source(folder, read(folder, "train"), read(folder, "validation"), weight)
        for folder, weight in zip(
            cfg.sources, cfg.weights or [None] * len(cfg.sources), strict=True
        )
    )
    if len({s.train.paired for s in sources}) > 1:
        raise PreparedError(
            "data.sources mix preference pairs with other texts: no objective is for both"
        )
    if sources[0].train.paired and cfg.packing != "best_fit":
        raise PreparedError("preference pairs stay whole: set data.packing='best_fit'")
    return tuple(sources)


def _check_fit(
    folder: str | Path, manifest: dict[str, Any], digest: str, special: SpecialTokens
) -> None:
    """Ids mean something only under the tokenizer that made them."""
    made = manifest["tokenizer"]["sha256"]
    if made != digest:
        raise PreparedError(
            f"{folder} was tokenized by another tokenizer (sha256 {made[:12]}…, the model's is "
            f"{digest[:12]}…): prepare it again with the model's"
        )
    if manifest["special"] != dataclasses.asdict(special):
        raise PreparedError(
            f"{folder} was prepared with special tokens {manifest['special']}, the model has "
            f"{dataclasses.asdict(special)}: prepare it again"
        )
