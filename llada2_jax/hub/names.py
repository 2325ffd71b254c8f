"""The one table of tensor names: Hugging Face (LLaDA2, Ling 2.0, dFactory) <-> our parameters.

A linear weight is [out, in] there and [in, ...out] here; layers of a kind are stacked on our first
axis, experts on the second, and gate and up share one array.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

import numpy as np

from llada2_jax.types import ModelConfig

_LAYER = "model.layers.{layer}."


@dataclasses.dataclass(frozen=True)
class Rule:
    """path: of our parameter. names: the Hugging Face tensors of one slice of it (two: gate, up).
    shape: of each of them, in symbols of `_sizes`. merged: dFactory's names, experts stacked."""

    path: str
    names: tuple[str, ...]
    shape: str
    merged: tuple[str, ...] = ()

    @property
    def per_expert(self) -> bool:
        return bool(self.merged)


def _layer_rules(stack: str) -> list[Rule]:
    def rule(path: str, name: str, shape: str) -> Rule:
        return Rule(f"{stack}/{path}", (_LAYER + name,), shape)

    return [
        rule("attention_norm/scale", "input_layernorm.weight", "D"),
        rule("attention/qkv", "attention.query_key_value.weight", "qkv D"),
        rule("attention/q_norm/scale", "attention.query_layernorm.weight", "h"),
        rule("attention/k_norm/scale", "attention.key_layernorm.weight", "h"),
        rule("attention/out", "attention.dense.weight", "D q"),
        rule("mlp_norm/scale", "post_attention_layernorm.weight", "D"),
    ]


def _swiglu_rules(path: str, module: str, width: str) -> list[Rule]:
    names = tuple(f"{_LAYER}{module}.{part}_proj.weight" for part in ("gate", "up", "down"))
    return [
        Rule(f"{path}/gate_up", names[:2], f"{width} D"),
        Rule(f"{path}/down", names[2:], f"D {width}"),
    ]


def _expert_rules() -> list[Rule]:
    stem = _LAYER + "mlp.experts."
    names = tuple(stem + f"{{expert}}.{part}_proj.weight" for part in ("gate", "up", "down"))
    merged = tuple(stem + f"{part}_proj" for part in ("gate", "up", "down"))
    path = "moe_layers/mlp/experts"
    return [
        Rule(f"{path}/gate_up", names[:2], "Fe D", merged[:2]),
        Rule(f"{path}/down", names[2:], "D Fe", merged[2:]),
    ]


TABLE: tuple[Rule, ...] = (
    Rule("embedding", ("model.word_embeddings.weight",), "V D"),
    *_layer_rules("dense_layers"),
    *_swiglu_rules("dense_layers/mlp", "mlp", "F"),
    *_layer_rules("moe_layers"),
    Rule("moe_layers/mlp/router/kernel", (_LAYER + "mlp.gate.weight",), "E D"),
    Rule("moe_layers/mlp/router/expert_bias", (_LAYER + "mlp.gate.expert_bias",), "E"),
    *_expert_rules(),
    *_swiglu_rules("moe_layers/mlp/shared", "mlp.shared_experts", "Fs"),
    Rule("final_norm/scale", ("model.norm.weight",), "D"),
    Rule("head", ("lm_head.weight",), "V D"),
)

_UNTRANSPOSED = {"embedding"}  # [V, D] on both sides


def _sizes(cfg: ModelConfig) -> dict[str, int]:
    return {
        "V": cfg.vocab_size,
        "D": cfg.hidden_size,
        "E": cfg.num_experts,
        "h": cfg.head_dim,
        "q": cfg.num_heads * cfg.head_dim,
        "qkv": (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim,
        "F": cfg.intermediate_size,
        "Fe": cfg.moe_intermediate_size,
        "Fs": cfg.moe_intermediate_size * cfg.num_shared_experts,
    }


@dataclasses.dataclass(frozen=True)
class Source:
    """A Hugging Face tensor, or the slice [lead] of one that stacks the experts."""

    name: str
    lead: int | None = None


@dataclasses.dataclass(frozen=True)
class Slice:
    """parameter[index] of ours and the Hugging Face tensors it is made of, each of `shape`."""

    path: str
    index: tuple[int, ...]
    sources: tuple[Source, ...]
    shape: tuple[int, ...]

    def to_ours(self, tensors: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        """Our slice, of `shape`, from the tensors of `sources`. May be a view."""
        if self.path not in _UNTRANSPOSED:
            tensors = [tensor.T for tensor in tensors]
        joined = tensors[0] if len(tensors) == 1 else np.stack(tensors, axis=1)
        return joined.reshape(shape)

    def to_hf(self, value: np.ndarray) -> list[np.ndarray]:
        """The tensors of `sources` from our slice. May be views."""
        parts = [value] if len(self.sources) == 1 else [value[:, i] for i in (0, 1)]
        if self.path in _UNTRANSPOSED:
            return parts
        return [part.reshape(self.shape[::-1]).T for part in parts]


def rules(cfg: ModelConfig) -> list[Rule]:
    """The rules of the parameters that this architecture has."""
    present = {
        "dense_layers": cfg.num_dense_layers > 0,
        "moe_layers": cfg.num_moe_layers > 0,
        "head": not cfg.tie_word_embeddings,
    }
    found = [rule for rule in TABLE if present.get(rule.path.split("/")[0], True)]
    if not cfg.num_shared_experts:
        found = [rule for rule in found if "/shared/" not in rule.path]
    return found


def slices(cfg: ModelConfig, rule: Rule, *, merged: bool = False) -> Iterator[Slice]:
    """All slices of one parameter, in the order of its leading axes.

    merged: name dFactory's stacked experts instead of one tensor an expert.
    """
    sizes = _sizes(cfg)
    shape = tuple(sizes[symbol] for symbol in rule.shape.split())
    for layer in _layers(cfg, rule):
        for expert in range(cfg.num_experts) if rule.per_expert else (None,):
            lead = expert if merged and rule.per_expert else None
            templates = rule.names if lead is None else rule.merged
            names = [name.format(layer=layer, expert=expert) for name in templates]
            yield Slice(
                path=rule.path,
                index=_index(cfg, rule, layer, expert),
                sources=tuple(Source(name, lead) for name in names),
                shape=shape,
            )


def _layers(cfg: ModelConfig, rule: Rule) -> Sequence[int | None]:
    if rule.path.startswith("dense_layers/"):
        return range(cfg.num_dense_layers)
    if rule.path.startswith("moe_layers/"):
        return range(cfg.num_dense_layers, cfg.num_layers)
    return (None,)


def _index(cfg: ModelConfig, rule: Rule, layer: int | None, expert: int | None) -> tuple[int, ...]:
    if layer is None:
        return ()
    row = layer - (cfg.num_dense_layers if rule.path.startswith("moe_layers/") else 0)
    return (row,) if expert is None else (row, expert)


def hf_order(cfg: ModelConfig) -> list[Slice]:
    """All slices in the order that a model file lists them: embedding, layer by layer, head."""
    by_layer: dict[int, list[Slice]] = {}
    before, after = [], []
    for rule in rules(cfg):
        for part in slices(cfg, rule):
            if part.index:
                dense = rule.path.startswith("dense_layers/")
                layer = part.index[0] + (0 if dense else cfg.num_dense_layers)
                by_layer.setdefault(layer, []).append(part)
            else:
                (before if rule.path == "embedding" else after).append(part)
    middle = [part for layer in sorted(by_layer) for part in by_layer[layer]]
    return before + middle + after


def is_merged(names: set[str]) -> bool:
    """Whether the experts are stacked, as dFactory writes them."""
    return any(re.search(r"\.mlp\.experts\.(gate|up|down)_proj$", name) for name in names)


def mtp_names(names: set[str], cfg: ModelConfig, layers: int) -> set[str]:
    """Tensors of multi-token prediction layers: of the `layers` that follow the last layer."""
    indices = range(cfg.num_layers, cfg.num_layers + layers)
    return {name for name in names if layer_of(name) in indices}


def layer_of(name: str) -> int | None:
    """The index of the layer that a tensor belongs to; None outside the layers."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None
