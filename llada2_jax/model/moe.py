"""Group-limited sigmoid routing and the mixture layer (released `LLaDA2MoeGate`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llada2_jax.model.experts import Experts
from llada2_jax.model.layers import Buffer, FeedForward, normal, parameter
from llada2_jax.sharding import cut, gathered, on_shards, sum_over
from llada2_jax.types import ExpertLoad, ModelConfig


class Router(nnx.Module):
    """Chooses experts by sigmoid score + bias, weighs them by the score alone. All in fp32."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        d, e = cfg.hidden_size, cfg.num_experts
        self.kernel = parameter(rngs, (d, e), ("embed", None), normal(cfg), cfg.param_dtype)
        zeros = nnx.initializers.zeros
        self.expert_bias = parameter(rngs, (e,), (None,), zeros, "float32", kind=Buffer)
        self.cfg = cfg

    def __call__(
        self, x: Float[Array, "tokens D"]
    ) -> tuple[Int[Array, "tokens k"], Float[Array, "tokens k"], Float[Array, "tokens E"]]:
        """Expert ids, their weights and the logits of all experts, fp32."""
        cfg = self.cfg
        logits = x.astype(jnp.float32) @ gathered(self.kernel, jnp.float32)
        scores = jax.nn.sigmoid(logits)
        biased = jax.lax.stop_gradient(scores) + self.expert_bias[...].astype(jnp.float32)
        experts = _group_limited_topk(biased, cfg)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if cfg.norm_topk_prob and cfg.experts_per_token > 1:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        return experts, weights * cfg.routed_scaling_factor, logits


def _group_limited_topk(scores: Float[Array, "tokens E"], cfg: ModelConfig):
    """Top-k among the experts of the topk_group best groups; a group scores its two best."""
    tokens, experts = scores.shape
    grouped = scores.reshape(tokens, cfg.n_group, experts // cfg.n_group)
    group_score = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
    kept = jax.lax.top_k(group_score, cfg.topk_group)[1]
    keep = (kept[:, :, None] == jnp.arange(cfg.n_group)).any(1)
    masked = jnp.where(keep[:, :, None], grouped, -jnp.inf).reshape(tokens, experts)
    return jax.lax.top_k(masked, cfg.experts_per_token)[1]


class MoE(nnx.Module):
    """Routed experts plus the shared ones."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.router = Router(cfg, rngs)
        self.experts = Experts(cfg, rngs)
        if cfg.num_shared_experts:
            width = cfg.moe_intermediate_size * cfg.num_shared_experts
            self.shared = FeedForward(width, cfg, rngs, module="shared")

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Array, ExpertLoad]:
        """The mixture's output and what the router did."""
        graphdef, params = nnx.split(self)

        def mix(params, x):
            return nnx.merge(graphdef, params)._mix(x)

        tokens = cut("batch", "length")
        return on_shards(mix, params, x, specs=[tokens], out_specs=(tokens, cut()))

    def _mix(self, x: Float[Array, "B T D"]) -> tuple[Array, ExpertLoad]:
        """Of a device's tokens, with its part of the width of every expert."""
        flat = x.reshape(-1, x.shape[-1])
        experts, weights, logits = self.router(flat)
        out, overflow = self.experts(flat, experts, weights)
        out = out.reshape(x.shape)
        out = out + self.shared(x) if hasattr(self, "shared") else out
        load = ExpertLoad(
            tokens=jnp.bincount(experts.reshape(-1), length=self.router.cfg.num_experts),
            overflow=overflow,
            z=(jax.nn.logsumexp(logits, axis=-1) ** 2).sum(),
        )
        load = jax.tree.map(lambda part: sum_over(part, "batch", "length"), load)
        return sum_over(out, "mlp"), load
