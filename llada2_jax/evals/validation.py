"""Scores of fixed rows, which a run and its reports compare models by."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from llada2_jax.config import TrainConfig
from llada2_jax.objectives import Context, LossOutput
from llada2_jax.types import Batch, Params, WeightedSum

EvalStep = Callable[[Params, Batch, Context], LossOutput]  # see train_step.make_eval_step


def validated(cfg: TrainConfig, objective: str, block_size: int) -> tuple[str, int]:
    """What a phase of this objective and block size is validated under: the same, or blocks of
    config.eval.target_block_size; CAP as bdlm, so that stages compare on the bound."""
    target = cfg.eval.target_block_size
    if objective != "ar" and target:
        return "bdlm", target
    return "bdlm" if objective == "cap" else objective, block_size


@dataclasses.dataclass(frozen=True)
class RowScores:
    """Validation of fixed rows, one entry a row: fp64 nats and bytes; tokens: their number."""

    nats: np.ndarray
    bytes: np.ndarray
    tokens: float

    def figures(self) -> dict[str, float]:
        """Nats a token and bits a byte, with the latter's standard error over rows."""
        bits, error = _bits_per_byte(self.nats, self.bytes)
        nats = float(self.nats.sum() / self.tokens)
        return {"nats_per_token": nats, "bits_per_byte": bits, "bits_per_byte_stderr": error}

    def minus(self, other: RowScores) -> tuple[float, float]:
        """Difference in bits a byte on the same rows, and the standard error of the difference."""
        return _bits_per_byte(self.nats - other.nats, self.bytes)


def _bits_per_byte(nats: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """The ratio of two sums over rows, and its standard error by linearisation."""
    bits = nats / np.log(2)
    ratio = bits.sum() / sizes.sum()
    error = np.std(bits - ratio * sizes, ddof=1) * np.sqrt(len(sizes)) / sizes.sum()
    return float(ratio), float(error)


def score_pairs(
    step: EvalStep,
    params: Params,
    batches: list[Batch],
    context: Context,
) -> dict[str, float]:
    """Of fixed rows of preference pairs: their number, the loss, and the objective's metrics."""
    outputs = [step(params, batch, context) for batch in batches]
    means = [{"loss": output.loss, **output.metrics} for output in outputs]
    sums = jax.tree.map(
        lambda *parts: functools.reduce(WeightedSum.__add__, parts),
        *means,
        is_leaf=lambda x: isinstance(x, WeightedSum),
    )
    return {"pairs": float(sums["loss"].weight)} | {k: float(v.mean()) for k, v in sums.items()}


def score_rows(
    step: EvalStep,
    params: Params,
    batches: list[Batch],
    contexts: list[Context],
    token_bytes: np.ndarray,
) -> RowScores:
    """Scores fixed rows.

    The first token of every segment is left out of loss_mask by the caller, so that AR and block
    diffusion are scored on the same tokens and bytes. contexts: one for each Monte Carlo draw.
    """
    weight, nats, sizes = 0.0, [], []
    for batch in batches:
        outputs = [step(params, batch, context) for context in contexts]
        nats.append(np.mean([np.asarray(o.nll, np.float64).sum(1) for o in outputs], axis=0))
        sizes.append((token_bytes[batch.tokens] * batch.loss_mask).sum(1))
        weight += float(outputs[0].loss.weight)
    return RowScores(np.concatenate(nats), np.concatenate(sizes).astype(np.float64), weight)
