"""Block diffusion (eq. 1, 2, 5) and its one-block case MDLM: predict what the noise masked.

Pretraining and supervised fine-tuning are the same objective on other rows: a prompt is what
loss_mask leaves out.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llada2_jax.diffusion import Noised, corrupt, embedding_noise, replace_visible
from llada2_jax.model import Transformer
from llada2_jax.objectives.base import (
    Context,
    LossOutput,
    loss_weights,
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
    return denoising_loss(model, draw_noise(batch, context), context, clean_half=True)


def mdlm_objective(model: Transformer, batch: Batch, context: Context) -> LossOutput:
    """One block a document: no earlier block, so no clean half, and half the positions (§4.1)."""
    return denoising_loss(model, draw_noise(batch, context), context, clean_half=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
    """Rows as one forward denoises them; the members of a complementary pair are rows of it.

    batch: the clean rows. block: int32, of every token. noised: the noise. supervised: fp32, loss
    weights of what may be asked for. masked: fp32, of them those of masked tokens; visible: of the
    others. All [members · B, L].
    """

    batch: Batch
    block: Int[Array, "rows L"]
    noised: Noised
    supervised: Float[Array, "rows L"]
    members: int = dataclasses.field(metadata={"static": True})

    @property
    def masked(self) -> Float[Array, "rows L"]:
        return jnp.where(self.noised.noise_mask, self.supervised, 0.0)

    @property
    def visible(self) -> Float[Array, "rows L"]:
        return jnp.where(self.noised.noise_mask, 0.0, self.supervised)


def draw_noise(batch: Batch, context: Context) -> Draw:
    """The context's Monte Carlo draw of the noise for a batch."""
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
    noised = jax.tree.map(lambda *x: jnp.concatenate(x), *members)
    batch, block = jax.tree.map(lambda x: jnp.tile(x, (len(members), 1)), (batch, block))
    supervised = jnp.where(noised.supervised, loss_weights(batch), 0.0)
    return Draw(batch, block, noised, supervised, len(members))


def denoising_loss(
    model: Transformer,
    draw: Draw,
    context: Context,
    *,
    clean_half: bool,
    entropy_weights: Float[Array, "rows L"] | None = None,
) -> LossOutput:
    """The weighted cross-entropy of what the noise masked and, where the token-to-token stream is
    on, of what it left visible.

    entropy_weights: of the entropy of each masked token that is predicted correctly (CAP).
    """
    low, high = context.rates
    in_range = (draw.noised.rate > low) & (draw.noised.rate <= high)
    masked, visible = (jnp.where(in_range, x, 0.0) for x in (draw.masked, draw.visible))
    batch, noised, weights = draw.batch, draw.noised, masked * draw.noised.weight
    if context.noise.edit_rate:
        noised = _with_edits(model, draw, context)
        weights += context.noise.edit_weight * visible
    if entropy_weights is not None:
        entropy_weights = jnp.where(in_range, entropy_weights, 0.0)
    hidden, load = noisy_hidden(model, batch, noised, draw.block, context, clean_half=clean_half)
    total, stats = weighted_nll(
        model,
        hidden,
        batch.tokens,
        weights,
        entropy_weights=entropy_weights,
        temperature=context.cap.temperature,
    )
    nll = weights * stats.nll
    metrics = prediction_metrics(stats, masked > 0)
    metrics["masked_nll"] = weighted(stats.nll, masked > 0)
    metrics["mask_rate"] = weighted(draw.masked > 0, draw.supervised > 0)
    if context.noise.edit_rate:
        replaced = (visible > 0) & (noised.tokens != batch.tokens)
        metrics["edit_nll"] = weighted(stats.nll, visible > 0)
        metrics["edit_recovery"] = weighted(stats.correct, replaced)
    if entropy_weights is not None and stats.entropy is not None:
        certainty = jnp.where(stats.correct, stats.entropy, 0.0)
        nll += entropy_weights * certainty
        metrics["confidence_loss"] = weighted(certainty, masked)
    return LossOutput(
        loss=WeightedSum(total, draw.supervised.sum()),
        nll=nll.reshape(draw.members, -1, nll.shape[1]).mean(0),
        metrics=metrics,
        expert_load=load,
    )


def _with_edits(model, draw: Draw, context: Context) -> Noised:
    """The noise with some visible tokens replaced by random ids."""
    tokens = replace_visible(
        draw.batch,
        draw.noised,
        context.noise.edit_rate,
        mask_id=context.mask_id,
        vocab_size=model.cfg.vocab_size,
        seed=context.seed,
        draw=context.draw,
    )
    return dataclasses.replace(draw.noised, tokens=tokens)


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
