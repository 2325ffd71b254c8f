"""Next-token prediction: one clean half under block size 1."""

from __future__ import annotations

import jax.numpy as jnp

from llada2_jax.model import Transformer
from llada2_jax.objectives.base import (
    Context,
    LossOutput,
    loss_weights,
    prediction_metrics,
    weighted_nll,
)
from llada2_jax.types import Batch, WeightedSum
from pallas_kernels.block_layout import CLEAN, block_index, half_layout


def ar_objective(model: Transformer, batch: Batch, context: Context) -> LossOutput:
    """Mean −log p(x_i | x_<i). A document's first token has no predecessor and is not scored."""
    block = block_index(batch.positions, 1, context.block_anchor)
    layout = half_layout(block, batch.segment_ids, CLEAN)
    output = model(batch.tokens, batch.positions, layout)
    follows = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
    weights = jnp.where(follows, loss_weights(batch)[:, 1:], 0.0)
    weights = jnp.pad(weights, ((0, 0), (0, 1)))  # by predecessor: a row's last token has no target
    targets = jnp.roll(batch.tokens, -1, axis=1)
    total, stats = weighted_nll(model, output.hidden, targets, weights)
    return LossOutput(
        loss=WeightedSum(total, weights.sum()),
        nll=jnp.roll(weights * stats.nll, 1, axis=1),
        metrics=prediction_metrics(stats, weights > 0),
        expert_load=output.expert_load,
    )
