"""What must hold of a model, whoever describes it: a config, a Hugging Face file, a caller."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from llada2_jax import remat
from llada2_jax.types import DTYPES, ModelConfig
from pallas_kernels import block_attention, grouped_matmul

CHOICES = {
    "dtype": DTYPES,
    "param_dtype": DTYPES,
    "attention_backend": block_attention.BACKENDS,
    "experts_backend": grouped_matmul.BACKENDS,
    "expert_exchange": ("auto", "gather", "ragged"),
    "remat": tuple(remat.POLICIES),
}
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
    "experts_per_token",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "rms_norm_eps",
    "max_position_embeddings",
    "expert_chunks",
)
_NOT_NEGATIVE = (
    "num_shared_experts",
    "first_k_dense_replace",
    "initializer_range",
    "expert_buffer",
)


def check_model(
    cfg: ModelConfig, where: str, error: type[Exception], names: Mapping[str, str] | None = None
) -> None:
    """Raises `error` that names the field, its value and what it may be, unless the model can be
    built and computed. The values' types are not looked at: see typed.py.

    where: what a message begins with, e.g. "config.model.". names: what the fields are called
    there, if not as in ModelConfig.
    """
    names = names or {}

    def require(condition: bool, field: str, may_be: str, *others: str) -> None:
        if condition:
            return
        value: Any = operator.attrgetter(field)(cfg)
        given = (f"{names.get(other, other)}={getattr(cfg, other)}" for other in others)
        reason = " ".join([may_be, ", ".join(given)]).strip()
        raise error(f"{where}{names.get(field, field)} is {value!r}; {reason}")

    for field, choices in CHOICES.items():
        require(getattr(cfg, field) in choices, field, f"choose one of {', '.join(choices)}")
    for field in _POSITIVE:
        require(getattr(cfg, field) > 0, field, "it must be positive")
    for field in _NOT_NEGATIVE:
        require(getattr(cfg, field) >= 0, field, "it must not be negative")
    for field, divisor in (("num_heads", "num_kv_heads"), ("num_experts", "n_group")):
        multiple = getattr(cfg, field) % getattr(cfg, divisor) == 0
        require(multiple, field, "it must be a multiple of", divisor)
    require(cfg.topk_group <= cfg.n_group, "topk_group", "it must be at most", "n_group")
    choice = cfg.num_experts // cfg.n_group * cfg.topk_group
    require(
        cfg.experts_per_token <= choice,
        "experts_per_token",
        f"the router chooses among {choice} experts, by",
        *("topk_group", "num_experts", "n_group"),
    )
    require(
        0 < cfg.partial_rotary_factor <= 1 and cfg.rotary_dim > 0 and cfg.rotary_dim % 2 == 0,
        "partial_rotary_factor",
        "it must be a share, up to 1, that is an even number of",
        "head_dim",
    )
    require(cfg.rope_theta > 1, "rope_theta", "it must be more than 1")
    if cfg.rope_scaling is None:
        return
    yarn = cfg.rope_scaling
    positive = "it must be positive"
    attention, fast, slow = yarn.attention_factor, yarn.beta_fast, yarn.beta_slow
    for field, holds, may_be in (
        ("factor", yarn.factor >= 1, "it must be at least 1"),
        ("original_max_position_embeddings", yarn.original_max_position_embeddings > 0, positive),
        ("beta_slow", slow > 0, positive),
        ("beta_fast", fast >= slow, f"it must be at least beta_slow={slow}"),
        ("attention_factor", attention is None or attention > 0, positive),
    ):
        require(holds, f"rope_scaling.{field}", may_be)
