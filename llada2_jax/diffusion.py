"""The noise: which tokens become masks, and what each masked token's loss weighs.

Noise is a function of (seed, document, visit, position in the document) and of nothing else: not of
the step, the rank or the neighbours in the row. Resuming, re-sharding and accumulating leave it
alone, and so does packing, as long as blocks are anchored at documents that are not split.

What is estimated
-----------------
With the linear schedule α_t = 1 − t the bound of a block of n tokens (eq. 1, weight 1/t) is

    ∫₀¹ E[ 1/t · Σ_masked CE ] dt  =  Σ_{k=1..n} 1/n · E_{|masked| = k}[ n/k · Σ_masked CE ] .

The right side follows by integrating t out: given k masks among n the mean of 1/t times the chance
of k is 1/k. It is the "count" draw: k uniform on 1..n, a random subset of size k, weight n/k. Same
expectation as drawing t and then n coins, without the infinite variance of 1/t, and with at least
one mask a block; at block size 1 every token is masked with weight 1, which is exact.

"bernoulli" draws t uniform on [t_min, t_max], then a coin for each token, weight (t_max − t_min)/t:
unbiased for the integral over [t_min, t_max], which is the bound only for (0, 1]. A narrower range
is the mask-ratio bandwidth of post-training (§5.1).

Weights "flat" weigh every masked token 1. The target is then not a bound but the mean summed
cross-entropy of what is masked: over k with "count", over t in [t_min, t_max] with "bernoulli".

Complementary pairs (§5.1) carry each row twice, the second with the inverse mask, so that every
token is supervised once. What the pair estimates is the mean of its members' targets:

    count      elbo   k uniform on 0..n, weight (n+1)/k; n−k has the same law: both the bound
    count      flat   both the mean over k in 0..n
    bernoulli  elbo   1/t and 1/(1−t), times t_max − t_min: the integrals over [t_min, t_max] and
                      over [1 − t_max, 1 − t_min]
    bernoulli  flat   the means over these two ranges

group = "sequence" draws one rate for all the blocks of a document (as the paper's equations print
it) instead of one for each. The expectation is the same, but for "count" with weights "flat": k is
then uniform on the numbers of masks of the whole document.

What is supervised
------------------
Only tokens of loss_mask are ever noised, so a prompt is not (eq. 5). Their loss weights multiply
the weights above, and the sum is divided by the sum of the loss weights, masked or not.

A block may hold the end of one assistant turn and what was said next. later_turns = "learn"
supervises all of its turns: the first is then denoised in sight of the answer to it, which decoding
never has. "hide" supervises the first turn of a block only, and makes masks of all that follows it
in the noisy half. A turn is a run of supervised tokens.

edit_rate > 0 adds the token-to-token stream of LLaDA2.1 (arXiv 2602.08676): of the supervised
tokens that stay visible that share is replaced by ids drawn uniformly, and all the visible ones are
asked for themselves, with weight edit_weight; also those that stay, or the model would learn that a
token it sees is never right. Masked tokens then have a partly wrong context: not the bound either.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from llada2_jax.config import NoiseConfig
from llada2_jax.types import Batch
from pallas_kernels.block_layout import HostOrDevice, Scalar, group_bounds

_GOLDEN = 2654435769  # 2³² / golden ratio: consecutive multiples fill the circle evenly


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noised:
    """tokens: noisy ids. noise_mask: what was masked. supervised: what may be asked for, masked or
    not. weight: fp32, of each supervised masked token's cross-entropy (0 elsewhere). rate: fp32,
    share of its group that was masked. All [B, L]."""

    tokens: Int[Array, "B L"]
    noise_mask: Bool[Array, "B L"]
    supervised: Bool[Array, "B L"]
    weight: Float[Array, "B L"]
    rate: Float[Array, "B L"]


def _bits(seed: int, purpose: int, *coordinates: Int[HostOrDevice, "B L"]) -> UInt[Array, "B L"]:
    """32 random bits for each point; equal coordinates give equal bits on any device."""
    key = jax.random.fold_in(jax.random.key(seed), purpose)

    def draw(*point):
        k = key
        for x in point:
            k = jax.random.fold_in(k, x)
        return jax.random.bits(k)

    return jax.vmap(jax.vmap(draw))(*coordinates)


def _unit(bits: UInt[Array, "B L"]) -> Float[Array, "B L"]:
    """Uniform on (0, 1), never 0 or 1."""
    return ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23


def _group_uniform(batch: Batch, start, block_size, cfg: NoiseConfig, seed: int, draw):
    """One uniform number a group, equal for all its tokens.

    With low discrepancy the blocks of a document step around the circle by the golden ratio from
    the document's own random origin, so that they cover all rates evenly. A group that spans
    documents (data.document_mask=False) belongs to the one of its first token.
    """
    document, visit, position = (
        jnp.take_along_axis(x, start, 1)
        for x in (batch.document_ids, batch.visits, batch.document_positions)
    )
    index = -(-position // block_size)
    draws = jnp.full_like(index, draw)
    if not cfg.low_discrepancy:
        return _unit(_bits(seed, 0, document, visit, draws, index))
    origin = _bits(seed, 0, document, visit, draws)
    return _unit(origin + index.astype(jnp.uint32) * jnp.uint32(_GOLDEN))


def _count_before(flags: Bool[Array, "B L"]) -> Int[Array, "B L+1"]:
    """Flagged tokens before each place of the row, its end included."""
    return jnp.pad(jnp.cumsum(flags, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def _after_first_turn(supervised: Bool[Array, "B L"], start) -> Bool[Array, "B L"]:
    """What follows the first run of supervised tokens of its group, which begins at `start`."""

    def since_start(flags):
        before = _count_before(flags)
        return before[:, 1:] - jnp.take_along_axis(before, start, 1)

    ended = ~supervised & (since_start(supervised) > 0)
    return since_start(ended) > 0


def _ranks(score: UInt[Array, "B L"], start, maskable):
    """Rank of each token's score within its group, the maskable ones first."""
    length = score.shape[1]
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), score.shape)
    keys = (start, (~maskable).astype(jnp.int32), score, index)
    order = jax.lax.sort(keys, dimension=1, num_keys=3)[3]
    # A group is a contiguous run, so after sorting it stands where it stood before.
    place = jnp.zeros_like(order).at[jnp.arange(order.shape[0])[:, None], order].set(index)
    return place - start


def corrupt(
    batch: Batch,
    block: Int[Array, "B L"],
    block_size: Int[Scalar, ""],
    cfg: NoiseConfig,
    *,
    mask_id: int,
    seed: int,
    draw: int | Int[Scalar, ""] = 0,
    mirrored: bool | Bool[Array, ""] = False,
) -> list[Noised]:
    """Noise for a batch: one Noised, or the two of a complementary pair.

    Args:
      batch: clean rows; only tokens in loss_mask and in a document are ever noised.
      block: block of every token (`block_layout.block_index`).
      block_size: int32 scalar, may be traced.
      draw: number of the Monte Carlo sample, for estimates from several; may be traced.
      mirrored: the antithetic counterpart of the draw: rate 1 − t for t, and first to be masked
        what is last there. Of the same law, and wrong in the other direction; may be traced.
    """
    maskable = jnp.asarray(batch.loss_mask & (batch.segment_ids > 0))
    hidden = jnp.zeros_like(maskable)
    if cfg.later_turns == "hide":
        hidden = _after_first_turn(maskable, group_bounds(block, batch.segment_ids)[0])
        hidden &= batch.segment_ids > 0
        maskable &= ~hidden
    group = block if cfg.group == "block" else jnp.zeros_like(block)
    start, end = group_bounds(group, batch.segment_ids)
    u = _group_uniform(batch, start, block_size if cfg.group == "block" else 1, cfg, seed, draw)
    u = jnp.where(mirrored, 1 - u, u)
    draws = jnp.full_like(block, draw)
    score = _bits(seed, 1, batch.document_ids, batch.visits, draws, batch.document_positions)
    score = jnp.where(mirrored, ~score, score)
    count = _count_before(maskable)
    n = jnp.take_along_axis(count, end, 1) - jnp.take_along_axis(count, start, 1)
    if cfg.draw == "count":
        pairs = _count_draw(u, n, _ranks(score, start, maskable), cfg.complementary)
    else:
        pairs = _bernoulli_draw(u, _unit(score), cfg)
    noised = []
    for mask, weight, rate in pairs:
        mask = mask & maskable
        weight = jnp.where(mask, weight if cfg.weight == "elbo" else 1.0, 0.0)
        masked = mask | hidden
        tokens = jnp.where(masked, mask_id, batch.tokens)
        noised.append(Noised(tokens, masked, maskable, weight.astype(jnp.float32), rate))
    return noised


def _count_draw(u, n, rank, complementary: bool):
    """(mask, weight, rate) with k masks among n; both members of the pair if complementary."""
    size = n.astype(jnp.float32)

    def member(mask, k, states):
        k = k.astype(jnp.float32)
        return mask, states / jnp.maximum(k, 1.0), k / jnp.maximum(size, 1.0)

    if not complementary:
        k = jnp.minimum(jnp.floor(u * size).astype(jnp.int32) + 1, n)
        return [member(rank < k, k, size)]
    k = jnp.minimum(jnp.floor(u * (size + 1)).astype(jnp.int32), n)
    return [member(rank < k, k, size + 1), member(rank >= k, n - k, size + 1)]


def _bernoulli_draw(u, coin, cfg: NoiseConfig):
    """(mask, weight, rate) with independent coins of rate t."""
    width = cfg.t_max - cfg.t_min
    t = cfg.t_min + width * u
    first = (coin < t, width / t, t)
    if not cfg.complementary:
        return [first]
    return [first, (coin >= t, width / (1 - t), 1 - t)]


def replace_visible(
    batch: Batch,
    noised: Noised,
    rate: float,
    *,
    mask_id: int,
    vocab_size: int,
    seed: int,
    draw: int | Int[Scalar, ""] = 0,
) -> Int[Array, "B L"]:
    """The noisy ids with a share `rate` of the supervised, visible ones replaced by ids drawn
    uniformly (never the mask's): the token-to-token stream of LLaDA2.1."""
    point = (batch.document_ids, batch.visits, jnp.full_like(noised.tokens, draw))
    coin, bits = (_bits(seed, purpose, *point, batch.document_positions) for purpose in (3, 4))
    ids = (bits % (vocab_size - 1)).astype(jnp.int32)
    ids = jnp.where(ids < mask_id, ids, ids + 1)
    chosen = noised.supervised & ~noised.noise_mask & (_unit(coin) < rate)
    return jnp.where(chosen, ids, noised.tokens)


def embedding_noise(
    batch: Batch, noise_mask: Bool[Array, "B L"], size: int, sigma: Float[Scalar, ""], seed: int
) -> Float[Array, "B L D"]:
    """Independent Gaussian noise of scale sigma for the embedding at masked positions (§7.1).

    Autoregressive training never shows the mask token, and weight decay drives its embedding
    towards zero; the noise keeps the first gradients at high mask rates from exploding. Nothing is
    drawn while sigma is 0.
    """

    def noise():
        key = jax.random.fold_in(jax.random.key(seed), 2)

        def draw(document, visit, position):
            k = jax.random.fold_in(jax.random.fold_in(key, document), visit)
            return jax.random.normal(jax.random.fold_in(k, position), (size,))

        draws = jax.vmap(jax.vmap(draw))(batch.document_ids, batch.visits, batch.document_positions)
        return jnp.where(noise_mask[..., None], draws * sigma, 0.0)

    zeros = jnp.zeros((*noise_mask.shape, size), jnp.float32)
    return jax.lax.cond(sigma > 0, noise, lambda: zeros)
