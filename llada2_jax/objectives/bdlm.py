"""Block diffusion (eq. 1, 2) and its one-block case MDLM: predict what the noise masked."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llada2_jax.diffusion import Noised, corrupt, embedding_noise
from llada2_jax.model import Transformer
from llada2_jax.objectives.base import (
    Context,
    LossOutput,
    prediction_metrics,
    weighted,
    weighted_nll,
)
from llada2_jax.types import Batch, WeightedSum
from pallas_kernels.block_layout import NOISY, block_index, both_halves, half_layout


def bdlm_objective(model: Transformer, batch: Batch, context: Context) -> LossOutput:
    """The bound on −log p of each block given the clean blocks before it (eq. 1).

    The forward sees [noisy ; clean], 2L positions; only the noisy half meets the head. No label
    shift: a masked position predicts its own token. See diffusion.py for what is estimated.
    """
    return _diffusion(model, batch, context, clean_half=True)


def mdlm_objective(model: Transformer, batch: Batch, context: Context) -> LossOutput:
    """One block a document: no earlier block, so no clean half, and half the positions (§4.1)."""
    return _diffusion(model, batch, context, clean_half=False)


def _diffusion(model, batch: Batch, context: Context, *, clean_half: bool) -> LossOutput:
    block = block_index(batch.positions, context.block_size, context.block_anchor)
    members = corrupt(
        batch,
        block,
        context.block_size,
        context.noise,
        mask_id=context.mask_id,
        seed=context.seed,
        draw=context.draw,
    )
    # The members of a complementary pair are rows of one forward.
    noised = jax.tree.map(lambda *x: jnp.concatenate(x), *members)
    batch, block = jax.tree.map(lambda x: jnp.tile(x, (len(members), 1)), (batch, block))
    hidden, load = noisy_hidden(model, batch, noised, block, context, clean_half=clean_half)
    low, high = context.rates
    counted = noised.noise_mask & (noised.rate > low) & (noised.rate <= high)
    weights = jnp.where(counted, noised.weight, 0.0)
    total, stats = weighted_nll(model, hidden, batch.tokens, weights)
    nll = weights * stats.nll
    supervised = batch.loss_mask & (batch.segment_ids > 0)
    return LossOutput(
        loss=WeightedSum(total, supervised.sum(dtype=jnp.float32)),
        nll=nll.reshape(len(members), -1, nll.shape[1]).mean(0),
        metrics={
            **prediction_metrics(stats, counted),
            "masked_nll": weighted(stats.nll, counted),
            "mask_rate": weighted(noised.noise_mask, supervised),
        },
        expert_load=load,
    )


def noisy_hidden(model, batch: Batch, noised: Noised, block, context: Context, *, clean_half: bool):
    """Hidden states [B, L, D] of the noisy half, and the load of each expert.

    clean_half: whether the clean tokens are seen beside it (False: one block a document).
    """
    length, size = block.shape[1], model.cfg.hidden_size
    noise = embedding_noise(batch, noised.noise_mask, size, context.sigma, context.seed)
    if not clean_half:
        layout = half_layout(block, batch.segment_ids, NOISY)
        output = model(noised.tokens, batch.positions, layout, embedding_noise=noise)
        return output.hidden, output.expert_load
    output = model(
        jnp.concatenate([noised.tokens, batch.tokens], axis=1),
        jnp.concatenate([batch.positions, batch.positions], axis=1),
        both_halves(block, batch.segment_ids),
        embedding_noise=jnp.pad(noise, ((0, 0), (0, length), (0, 0))),
    )
    return output.hidden[:, :length], output.expert_load
