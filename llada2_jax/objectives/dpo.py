"""Direct preference optimisation with bounds on likelihoods (§5.3, eq. 7, 8)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llada2_jax.diffusion import Noised, corrupt
from llada2_jax.model import Transformer
from llada2_jax.objectives.base import (
    Context,
    LossOutput,
    prediction_metrics,
    token_nll,
    weighted,
)
from llada2_jax.objectives.bdlm import noisy_hidden
from llada2_jax.types import Batch, ExpertLoad, WeightedSum
from pallas_kernels.block_layout import block_index
from pallas_kernels.vocab_loss import TokenStats


def dpo_objective(model: Transformer, batch: Batch, context: Context) -> LossOutput:
    """Mean over pairs of −log σ(β [(B_θ − B_ref)(chosen) − (B_θ − B_ref)(rejected)]).

    B is a text's bound on log p, summed over its supervised tokens (`bound_shares`): the *log*
    likelihood, whose weight is positive; read literally, eq. 7 has the other sign and would prefer
    the rejected texts. batch.reference holds B_ref, under the same noise (see reference.py). The
    denominator is the number of pairs, so that neither packing nor accumulation matters.
    context.rates are not read: the loss is no sum over tokens.

    Metrics: reward_chosen and reward_rejected, β (B_θ − B_ref); reward_margin, their difference;
    reward_accuracy, how often it is positive; log_likelihood_chosen and _rejected, B_θ.

    Raises: ValueError for rows without pairs or without the reference's bounds.
    """
    if batch.preference is None or batch.reference is None:
        missing = "preference pairs" if batch.preference is None else "the reference's bounds"
        raise ValueError(f"the rows hold no {missing}: the objective 'dpo' needs them")
    shares, counted, stats, load = _bound_shares(model, batch, context)
    pair = jnp.asarray(batch.segment_ids + 1) // 2  # the texts are segments 2p − 1 and 2p
    first, second = jnp.asarray(batch.preference == 1), jnp.asarray(batch.preference == -1)
    reference = jnp.asarray(batch.reference)
    chosen, rejected = _pair_sums(shares, first, pair), _pair_sums(shares, second, pair)
    reference_chosen = _pair_sums(reference, first, pair)
    reference_rejected = _pair_sums(reference, second, pair)
    present = _pair_sums(jnp.ones_like(shares), first, pair) > 0
    reward_chosen = context.dpo.beta * (chosen - reference_chosen)
    reward_rejected = context.dpo.beta * (rejected - reference_rejected)
    margin = reward_chosen - reward_rejected
    losses = jnp.where(present, -jax.nn.log_sigmoid(margin), 0.0)
    begins = first & (batch.positions == 0)
    return LossOutput(
        loss=WeightedSum(losses.sum(), present.sum(dtype=jnp.float32)),
        nll=jnp.where(begins, jnp.take_along_axis(losses, pair, 1), 0.0),
        metrics={
            "reward_chosen": weighted(reward_chosen, present),
            "reward_rejected": weighted(reward_rejected, present),
            "reward_margin": weighted(margin, present),
            "reward_accuracy": weighted(margin > 0, present),
            "log_likelihood_chosen": weighted(chosen, present),
            "log_likelihood_rejected": weighted(rejected, present),
            **prediction_metrics(stats, counted),
        },
        expert_load=load,
    )


def bound_shares(model: Transformer, batch: Batch, context: Context) -> Float[Array, "B L"]:
    """Each token's share of its text's bound on log p (eq. 7): Σ over a text is B. fp32, ≤ 0.

    The mean of context.dpo.samples draws of the noise, which is a function of (seed, document,
    position, draw) alone: the two texts of a pair share it, and so do policy and reference, whose
    difference then varies less. With `antithetic` every second draw mirrors the one before it.
    Noise that covers (0, 1] with the weight "elbo" makes the mean unbiased for the bound; the
    draws are rows of one forward.
    """
    return _bound_shares(model, batch, context)[0]


def _bound_shares(
    model: Transformer, batch: Batch, context: Context
) -> tuple[Float[Array, "B L"], Bool[Array, "n L"], TokenStats, ExpertLoad]:
    """Also what was masked in all draws, and their statistics and expert load."""
    block = block_index(batch.positions, context.block_size, context.block_anchor)
    noised = _draws(batch, block, context)
    copies = noised.tokens.shape[0] // block.shape[0]
    rows, block = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), (batch, block))
    hidden, load = noisy_hidden(model, rows, noised, block, context, clean_half=True)
    stats = token_nll(model, hidden, rows.tokens, noised.noise_mask)
    shares = -noised.weight * stats.nll
    shares = shares.reshape(-1, copies, shares.shape[1]).mean(1)
    return shares, noised.noise_mask, stats, load


def _draws(batch: Batch, block: Int[Array, "B L"], context: Context) -> Noised:
    """All draws, and members of complementary pairs, of a row below each other: [B · n, L].

    Which visit it is does not count: a reference's bounds are computed once.
    """
    batch = dataclasses.replace(batch, visits=jnp.zeros_like(batch.visits))
    number = jnp.arange(context.dpo.samples, dtype=jnp.int32)
    mirrored = jnp.zeros_like(number, bool)
    if context.dpo.antithetic:
        number, mirrored = number // 2, number % 2 == 1

    def draw(number, mirrored) -> list[Noised]:
        return corrupt(
            batch,
            block,
            context.block_size,
            context.noise,
            mask_id=context.mask_id,
            seed=context.seed,
            draw=number,
            mirrored=mirrored,
        )

    members = jax.vmap(draw)(number + context.draw * context.dpo.samples, mirrored)
    return jax.tree.map(
        lambda *x: jnp.moveaxis(jnp.stack(x), 2, 0).reshape(-1, x[0].shape[-1]), *members
    )


def _pair_sums(
    values: Float[Array, "B L"], where: Bool[Array, "B L"], pair: Int[Array, "B L"]
) -> Float[Array, "B pairs"]:
    """Σ of the values of each pair, by its number in the row; 0 for numbers without a pair."""
    rows, length = values.shape
    sums = jnp.zeros((rows, length // 2 + 1), values.dtype)
    return sums.at[jnp.arange(rows)[:, None], pair].add(jnp.where(where, values, 0.0))
