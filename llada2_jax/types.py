"""Names and shapes that the whole package shares.

Shape legend: B rows, L tokens a row (clean), T positions a forward (L or 2L), D hidden size,
H query heads, K key/value heads, h head size, E experts, k experts a token, F expert width,
V vocabulary, N layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.block_layout import HostOrDevice


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """YaRN (arXiv 2309.00071), as Hugging Face's rope utilities read it.

    factor: max_position_embeddings / original_max_position_embeddings where the latter is given.
    original_max_position_embeddings: context the model was trained at.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


ADAPTED_MODULES = ("attention", "dense", "experts", "shared")
"""What low-rank adapters may sit on: attention, dense feed-forwards, routed and shared experts."""


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685): a frozen weight W becomes W + alpha / rank · A B.

    rank: columns of A; 0: none. modules: of ADAPTED_MODULES, all their matrices."""

    rank: int = 0
    alpha: float = 16.0
    modules: tuple[str, ...] = ("attention",)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


GATHER_UP_TO = 8
"""Devices along `expert` up to which expert_exchange="auto" is "gather"."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of LLaDA2 / Ling 2.0 (BailingMoeV2); field names follow the field's terms.

    dtype: of activations and matmuls. param_dtype: of stored parameters. The router, norms,
    softmax and loss are fp32 whatever these say. lora: adapters, if the model
    has any, as parameters of their own.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    experts_per_token: int
    n_group: int
    topk_group: int
    num_shared_experts: int = 1
    first_k_dense_replace: int = 1
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    partial_rotary_factor: float = 0.5
    rope_theta: float = 600_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 16384
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    attention_backend: str = "auto"
    experts_backend: str = "auto"
    expert_buffer: float = 2.0
    expert_exchange: str = "auto"
    expert_chunks: int = 1
    remat: str = "none"
    lora: LoRAConfig | None = None

    @property
    def num_dense_layers(self) -> int:
        return min(self.first_k_dense_replace, self.num_layers)

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def for_tpu(self) -> ModelConfig:
        """With the backends that "auto" is on a TPU, to compile for one that is not at hand."""
        chosen = {"attention_backend": "tpu", "experts_backend": "ragged_dot"}
        open_ = {name: b for name, b in chosen.items() if getattr(self, name) == "auto"}
        return dataclasses.replace(self, **open_)

    @property
    def with_room_for_all(self) -> ModelConfig:
        """Whose experts leave nothing out: for programs that would not tell if they did."""
        return dataclasses.replace(self, expert_buffer=0.0)

    def exchange_over(self, devices: int) -> str:
        """How tokens reach their experts on so many devices, "gather" or "ragged": see
        model/experts.py. With 8 choices a token, gathering moves no more than pairs would up to 8
        devices."""
        if self.expert_exchange != "auto":
            return self.expert_exchange
        return "gather" if devices <= GATHER_UP_TO else "ragged"

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids with a meaning. mask: what a noised token becomes; eos ends a text; pad fills rows."""

    mask: int
    eos: int
    pad: int
    bos: int | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Clean packed rows, as the loader yields them; all [B, L], int32 unless said otherwise.

    tokens: clean ids. segment_ids: document within the row, from 1; 0 is padding.
    positions: restart at each document of the row. loss_mask: bool, what may be supervised.
    document_ids: stable id of the source document; document_positions: offset in that document;
    visits: how often the document has been seen before (the epoch). loss_weights: fp32, what each
    token's loss weighs; None: 1 wherever loss_mask is. preference: 1 in the chosen and -1 in the
    rejected text of a pair, 0 in padding; both texts are segments of one row and have one document
    id, the pair's. None: rows that hold no pairs. reference: fp32, sums over each text of a pair to
    its bound under the reference model; None: not known.
    """

    tokens: Int[HostOrDevice, "B L"]
    segment_ids: Int[HostOrDevice, "B L"]
    positions: Int[HostOrDevice, "B L"]
    loss_mask: Bool[HostOrDevice, "B L"]
    document_ids: Int[HostOrDevice, "B L"]
    document_positions: Int[HostOrDevice, "B L"]
    visits: Int[HostOrDevice, "B L"]
    loss_weights: Float[HostOrDevice, "B L"] | None = None
    preference: Int[HostOrDevice, "B L"] | None = None
    reference: Float[HostOrDevice, "B L"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedSum:
    """A mean that has not been divided yet, so that it adds up over micro-batches and devices."""

    total: Float[Array, "..."]
    weight: Float[Array, "..."]

    def mean(self) -> Float[Array, "..."]:
        """total / weight; 0 where the weight is 0."""
        return self.total / jnp.where(self.weight > 0, self.weight, 1.0)

    def __add__(self, other: WeightedSum) -> WeightedSum:
        return WeightedSum(self.total + other.total, self.weight + other.weight)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertLoad:
    """What routers did, of each MoE layer. tokens: int32, pairs an expert got. overflow: int32,
    pairs that found no room on their expert's device (see RuntimeConfig.expert_buffer) and were
    left out. z: fp32, Σ logsumexp(logits)² over positions."""

    tokens: Int[Array, "layers E"]
    overflow: Int[Array, " layers"]
    z: Float[Array, " layers"]


DTYPES = ("bfloat16", "float16", "float32")
"""What weights and activations can be."""

Params = Any
"""Pytree of parameter arrays, as `nnx.state` gives it for a Transformer."""
