"""The released models by name, for work that needs their shapes before their weights are there."""

from __future__ import annotations

import dataclasses

from llada2_jax.types import ModelConfig

_MINI = ModelConfig(
    vocab_size=157184,
    hidden_size=2048,
    num_layers=20,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=5120,
    moe_intermediate_size=512,
    num_experts=256,
    experts_per_token=8,
    n_group=8,
    topk_group=4,
)
_FLASH = dataclasses.replace(
    _MINI,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    intermediate_size=9216,
    moe_intermediate_size=1024,
)

ARCHITECTURES = {"mini": _MINI, "flash": _FLASH}
"""LLaDA2.0-mini (16B) and -flash (100B); Ling-mini-2.0 and -flash-2.0 are the same."""
