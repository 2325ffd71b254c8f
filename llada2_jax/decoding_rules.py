"""The choices a decoder makes, as data of its compiled program: which masked positions to accept,
which tokens to replace, when a row ends, and what sampling may draw from. sampler.py asks them at
every step; another rule is another class with the same methods."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

THRESHOLD = 0.95
"""Confidence above which the paper accepts (§5.4)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Threshold:
    """Accept whatever the model is sure of, and never nothing (§5.4).

    threshold: fp32 scalar; confidence must be strictly greater.
    schedule: int32 [block_size]; step s accepts at least schedule[s] positions. Entries count as
      at least 1, so that every step makes progress and a block takes at most block_size steps.
    """

    threshold: Float[Array, ""]
    schedule: Int[Array, " block"]

    def accept(
        self,
        confidence: Float[Array, "B block"],
        masked: Bool[Array, "B block"],
        step: Int[Array, " B"],
    ) -> Bool[Array, "B block"]:
        """The positions to fix at step `step` of their block; a subset of `masked`."""
        last = self.schedule.shape[0] - 1
        least = jnp.maximum(self.schedule[jnp.minimum(step, last)], 1)[:, None]
        sure = masked & (confidence > self.threshold)
        # A NaN must not outrank a masked position, or the loop would not end.
        score = jnp.where(masked, jnp.nan_to_num(confidence, nan=0.0), -1.0)
        rank = jnp.argsort(jnp.argsort(-score, axis=-1, stable=True), axis=-1)
        best = masked & (rank < least)
        return jnp.where(sure.sum(-1, keepdims=True) >= least, sure, best)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Editing:
    """Replace what was generated where the model now is sure of something else (arXiv 2602.08676).

    threshold: fp32 scalar; the other token's probability must be strictly greater; inf: never.
    budget: int32 scalar; forwards that a block without masks may still take. It ends before that
      with the first one that replaces nothing.
    """

    threshold: Float[Array, ""]
    budget: Int[Array, ""]

    def replace(
        self,
        tokens: Int[Array, "B block"],
        editable: Bool[Array, "B block"],
        best: Int[Array, "B block"],
        probability: Float[Array, "B block"],
    ) -> Bool[Array, "B block"]:
        """The positions whose token the most probable one replaces; a subset of `editable`."""
        return editable & (best != tokens) & (probability > self.threshold)

    def settled(
        self, replaced: Bool[Array, "B block"], forwards: Int[Array, " B"]
    ) -> Bool[Array, " B"]:
        """Whether a block without masks is left as it is.

        Args:
          replaced: by this forward. forwards: taken since the block had no mask, this one included.
        """
        unchanged = (forwards > 0) & ~replaced.any(-1)
        return unchanged | (forwards >= self.budget)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StopOnEos:
    """When a generated end-of-text ends its row.

    eos: int32 scalar, the id; -1 never stops. early: bool scalar. False: with the block in which
    the EOS stands. True: as soon as no mask is left before the EOS, even inside the block, and
    without editing it further.
    """

    eos: Int[Array, ""]
    early: Bool[Array, ""]

    def stop(
        self,
        tokens: Int[Array, "B block"],
        known: Bool[Array, "B block"],
        generated: Bool[Array, "B block"],
        finished: Bool[Array, " B"],
    ) -> Bool[Array, " B"]:
        """Whether the row ends after this step.

        Args:
          tokens: ids of the current block. known: prompt or accepted. generated: not prompt; an
            EOS inside the prompt stops nothing. finished: the block is left as it is.
        """
        nothing_open = jnp.cumsum(~known, axis=-1) == 0
        found = known & generated & (tokens == self.eos)
        early = (found & nothing_open).any(-1)
        return jnp.where(self.early, early, found.any(-1) & finished)


def even_schedule(block_size: int, steps: int) -> np.ndarray:
    """block_size positions split evenly over `steps` steps, the remainder first; int32
    [block_size], 0 after the last step."""
    count = np.zeros(max(block_size, steps), np.int32)
    count[:steps] = block_size // steps
    count[: block_size % steps] += 1
    return count[:block_size]


def filter_logits(
    logits: Float[Array, "... V"],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    min_p: Float[Array, ""],
) -> Float[Array, "... V"]:
    """−∞ for what top-k, then top-p, then min-p exclude; each sees the renormalised rest.

    top_k: keep the k largest (V: all). top_p: keep the smallest set of the largest whose
    probability reaches p (1: all). min_p: keep what has at least min_p times the largest
    probability (0: all). The largest always stays; equals of the last one kept stay as well.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    keep = jnp.arange(logits.shape[-1], dtype=jnp.int32) < top_k
    probability = jax.nn.softmax(jnp.where(keep, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # The sum's rounding must not cut anything where the filter is off.
    keep = keep & ((before < top_p) | (top_p >= 1))
    keep = keep & (probability >= min_p * probability[..., :1])
    keep = keep.at[..., 0].set(True)
    last = jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= last, logits, -jnp.inf)
