"""How many bits a model needs for a text: the diffusion bound, and exact chains to check it by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tokenizers import Tokenizer

from llada2_jax import progress
from llada2_jax.checkpoint import ModelBundle
from llada2_jax.config import NoiseConfig, TrainConfig
from llada2_jax.data.documents import Document, stable_hash
from llada2_jax.data.packing import tokenize
from llada2_jax.data.tokenizer import token_byte_lengths
from llada2_jax.errors import UserError
from llada2_jax.model import merge_params
from llada2_jax.objectives.base import Context, token_nll
from llada2_jax.train_step import make_context, make_eval_step
from llada2_jax.types import Batch, ModelConfig, Params
from pallas_kernels.block_layout import CLEAN, NOISY, half_layout

EVAL_SEED = 20251215  # the same validation noise in every run and phase
ROW_LENGTH = 2048  # of rows to score, where a model does not tell how long its own were
_WIDTHS = 64  # rows are as wide as the longest needs, up to a multiple of this


def validation_contexts(
    block_size: int, mask_id: int, samples: int, noise: NoiseConfig | None = None
) -> list[Context]:
    """One context a Monte Carlo draw: the bound itself, blocks anchored at documents."""
    plain = TrainConfig(seed=EVAL_SEED, noise=noise or NoiseConfig())
    return [make_context(plain, block_size, mask_id, draw=draw) for draw in range(samples)]


def preference_context(cfg: TrainConfig, mask_id: int) -> Context:
    """For validation on preference pairs: the run's kind of noise, eval.samples draws of it."""
    dpo = dataclasses.replace(cfg.dpo, samples=cfg.eval.samples)
    plain = dataclasses.replace(cfg, seed=EVAL_SEED, dpo=dpo)
    return make_context(plain, cfg.schedule.posttrain_block, mask_id)


class ScoreError(UserError, ValueError):
    """A text or a row length that cannot be scored; the message says why."""


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Of one text. nats: the bound on −log p (exact for "ar" and at block size 1), with the
    standard error of its Monte Carlo estimate. tokens: scored ones. bytes: of the text scored."""

    nats: float
    nats_stderr: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / np.log(2) / max(self.bytes, 1)

    @property
    def bits_per_byte_stderr(self) -> float:
        return self.nats_stderr / np.log(2) / max(self.bytes, 1)


def score_texts(
    bundle: ModelBundle,
    texts: Sequence[str],
    *,
    block_size: int,
    samples: int = 8,
    row_length: int | None = None,
    rows_per_step: int = 8,
    objective: str = "bdlm",
) -> list[Likelihood]:
    """Bits a byte of each text, under the diffusion bound or as an autoregressive model.

    A text longer than a row is scored in rows that do not see each other. With a bos token all of
    a row's text is scored; without one an autoregressive model leaves the row's first token out.

    Args:
      block_size: tokens a block; ignored by "ar".
      samples: Monte Carlo draws a row; the standard error comes from their spread.
      row_length: tokens of the longest context; default: `default_row_length`.
      objective: "bdlm" or "ar".

    Raises: ScoreError for an empty text or a row_length that the model does not take;
      CheckpointError for a bundle without a tokenizer.
    """
    tokenizer = tokenizer_of(bundle)
    row_length = _checked_row_length(bundle, row_length)
    batch, owner = _rows(bundle, tokenizer, texts, row_length, objective)
    scored = np.asarray(batch.loss_mask)
    sizes = token_byte_lengths(tokenizer)[batch.tokens] * scored
    step = make_eval_step(bundle.config, objective)
    contexts = validation_contexts(
        block_size, bundle.special.mask, 1 if objective == "ar" else samples
    )
    with progress.bar(what="scoring", total=len(contexts) * len(scored), unit="row") as bar:
        draws = np.stack(
            [_nats(step, bundle.params, batch, c, rows_per_step, bar.update) for c in contexts]
        )
    return [
        _likelihood(draws[:, owner == i], sizes[owner == i], scored[owner == i])
        for i in range(len(texts))
    ]


def default_row_length(bundle: ModelBundle) -> int:
    """Tokens a row that a run of ours trained the model at (of merged ones the longest); where
    nothing tells, ROW_LENGTH; never more than the model takes."""
    sources = [bundle.provenance, *bundle.provenance.get("merged", ())]
    trained = max((source.get("row_length", 0) for source in sources), default=0)
    return min(trained or ROW_LENGTH, bundle.config.max_position_embeddings)


def _checked_row_length(bundle: ModelBundle, row_length: int | None) -> int:
    longest = bundle.config.max_position_embeddings
    row_length = default_row_length(bundle) if row_length is None else row_length
    if not 2 <= row_length <= longest:
        raise ScoreError(
            f"row length {row_length}: must be at least 2, and at most the model's "
            f"max_position_embeddings={longest}"
        )
    return row_length


def _likelihood(draws: np.ndarray, sizes: np.ndarray, scored: np.ndarray) -> Likelihood:
    totals = draws.sum(axis=1)
    error = totals.std(ddof=1) / np.sqrt(len(totals)) if len(totals) > 1 else 0.0
    return Likelihood(float(totals.mean()), float(error), int(scored.sum()), int(sizes.sum()))


def tokenizer_of(bundle: ModelBundle) -> Tokenizer:
    """The bundle's tokenizer. Raises: CheckpointError if it has none."""
    return Tokenizer.from_str(bundle.tokenizer_json())


def _rows(
    bundle: ModelBundle,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    row_length: int,
    objective: str,
):
    """One segment a row, padded at the end; and which text each row belongs to."""
    empty = [i for i, text in enumerate(texts) if not text]
    if empty:
        raise ScoreError(f"text {empty[0]} is empty: there is nothing to score")
    documents = [Document(stable_hash(text), str(i), text) for i, text in enumerate(texts)]
    special = bundle.special
    tokenized = tokenize(documents, tokenizer, eos=special.eos, bos=None)
    opening = [] if special.bos is None else [special.bos]
    head = len(opening)
    first_scored = 1 if objective == "ar" else head  # nothing predicts what opens a row
    rows, owner = [], []
    for i, (start, end) in enumerate(zip(tokenized.offsets, tokenized.offsets[1:], strict=False)):
        for first in range(start, end - 1, row_length - head):  # the eos is not part of the text
            rows.append((tokenized.tokens[first : min(first + row_length - head, end - 1)], first))
            owner.append(i)
    longest = head + max(len(tokens) for tokens, _ in rows)
    shape = (len(rows), min(row_length, -(-longest // _WIDTHS) * _WIDTHS))
    required = [f.name for f in dataclasses.fields(Batch) if f.default is dataclasses.MISSING]
    fields = {name: np.zeros(shape, np.int32) for name in required}
    fields["tokens"][:] = special.pad
    fields["loss_mask"] = np.zeros(shape, bool)
    for r, (tokens, first) in enumerate(rows):
        n = head + len(tokens)
        fields["tokens"][r, :head] = opening
        fields["tokens"][r, head:n] = tokens
        fields["segment_ids"][r, :n] = 1
        fields["positions"][r, :n] = np.arange(n)
        fields["loss_mask"][r, first_scored:n] = True
        fields["document_ids"][r] = documents[owner[r]].id
        fields["document_positions"][r, :n] = first - tokenized.offsets[owner[r]] + np.arange(n)
    return Batch(**fields), np.asarray(owner)


def _nats(
    step,
    params,
    batch: Batch,
    context: Context,
    rows_per_step: int,
    update: Callable[[int], Any],
) -> np.ndarray:
    """fp64 [rows]: nats of each row, computed in batches of one shape; tells `update` how many."""
    count = len(batch.tokens)
    padded = -(-count // rows_per_step) * rows_per_step
    batch = jax.tree.map(
        lambda x: np.pad(x, ((0, padded - count), *[(0, 0)] * (x.ndim - 1))), batch
    )
    rows = []
    for start in range(0, padded, rows_per_step):
        part = jax.tree.map(lambda x, s=start: x[s : s + rows_per_step], batch)
        rows.append(np.asarray(step(params, part, context).nll, np.float64).sum(1))
        update(min(rows_per_step, count - start))
    return np.concatenate(rows)[:count]


def left_to_right_nll(
    cfg: ModelConfig, params: Params, batch: Batch, mask_id: int
) -> Float[Array, "B L"]:
    """−log p(x_i | x_<i) of a diffusion model that decodes one token at a time, exact.

    Every position is one mask against a cache of the clean tokens before it: the path of the
    sampler at block size 1, not the one of training. Equal to the bound at block size 1. Rows must
    hold one document each. fp32 [B, L], 0 where loss_mask is off.
    """
    model = merge_params(cfg, params)
    rows, length = batch.tokens.shape
    tokens, positions = jnp.asarray(batch.tokens), jnp.asarray(batch.positions)
    segments = jnp.asarray(batch.segment_ids)
    clean = half_layout(positions, segments, CLEAN)
    kv = model(tokens, positions, clean, return_kv=True).kv
    assert kv is not None

    def step(carry, i):
        own = jax.lax.dynamic_slice_in_dim(positions, i, 1, axis=1)
        segment = jax.lax.dynamic_slice_in_dim(segments, i, 1, axis=1)
        masks = jnp.full((rows, 1), mask_id, jnp.int32)
        cache = kv.until(jnp.full(rows, i, jnp.int32))
        hidden = model(masks, own, half_layout(own, segment, NOISY), cache=cache).hidden
        target = jax.lax.dynamic_slice_in_dim(tokens, i, 1, axis=1)
        stats = token_nll(model, hidden, target, jnp.ones_like(target, bool))
        return carry, stats.nll[:, 0]

    nll = jax.lax.scan(step, None, jnp.arange(length))[1].T
    return jnp.where(jnp.asarray(batch.loss_mask), nll, 0.0)
