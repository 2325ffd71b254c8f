"""Next-token prediction: one clean half under block size 1."""

from __future__ import annotations

import jax.numpy as jnp

from llada2_jax.model import Transformer
from llada2_jax.objectives.base import Context, LossOutput, cross_entropy, weighted
from llada2_jax.types import Batch
from pallas_kernels.block_layout import CLEAN, block_index, half_layout


def ar_objective(model: Transformer, batch: Batch, context: Context) -> LossOutput:
    """Mean −log p(x_i | x_<i). A document's first token has no predecessor and is not scored."""
    block = block_index(batch.positions, 1, context.block_anchor)
    layout = half_layout(block, batch.segment_ids, CLEAN)
    output = model(batch.tokens, batch.positions, layout)
    logits = model.logits(output.hidden[:, :-1])
    targets = batch.tokens[:, 1:]
    follows = (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & batch.loss_mask[:, 1:]
    scored = follows & (batch.segment_ids[:, 1:] > 0)
    nll = jnp.where(scored, cross_entropy(logits, targets), 0.0)
    correct = logits.argmax(-1) == targets
    return LossOutput(
        loss=weighted(nll, scored),
        nll=jnp.pad(nll, ((0, 0), (1, 0))),
        metrics={"accuracy": weighted(correct, scored)},
        expert_load=output.expert_load,
    )
