"""Hugging Face config.json and tokenizer files <-> ModelConfig and SpecialTokens.

Read: `llada2_moe` (LLaDA2), `bailing_moe_v2` (Ling 2.0, the AR parent) and dFactory's
`llada2_moe_veomni`. What the model here does not do is an error that names the field.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import typing
from collections.abc import Mapping
from typing import Any

from llada2_jax import typed
from llada2_jax.checkpoint import CheckpointError
from llada2_jax.config import model_dict
from llada2_jax.model_check import check_model
from llada2_jax.types import DTYPES, ModelConfig, RopeScaling, SpecialTokens

AR_MODEL_TYPE = "bailing_moe_v2"
MODEL_TYPES = {  # and the class in the file that their repositories bring
    "llada2_moe": "LLaDA2MoeModelLM",
    "llada2_moe_veomni": "LLaDA2MoeModelLM",
    "bailing_moe_v2": "BailingMoeV2ForCausalLM",
}
MASK_TOKEN = "<|mask|>"

# Hugging Face's name -> ours, where the value is the same.
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "n_group": "n_group",
    "topk_group": "topk_group",
    "num_shared_experts": "num_shared_experts",
    "first_k_dense_replace": "first_k_dense_replace",
    "routed_scaling_factor": "routed_scaling_factor",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
}
_FIELD_OF = {ours: theirs for theirs, ours in _FIELDS.items()}
# Fields that may be absent, and what the released model files take then.
_DEFAULTS = {"norm_topk_prob": True, "tie_word_embeddings": False, "initializer_range": 0.02}

# The only value that this model implements. An absent field means that value.
_FIXED: dict[str, Any] = {
    "use_bias": False,
    "use_qkv_bias": False,
    "hidden_act": "silu",
    "score_function": "sigmoid",
    "use_rmsnorm": True,
    "use_qk_norm": True,
    "moe_router_enable_expert_bias": True,
    "embedding_dropout": 0.0,
    "attention_dropout": 0.0,
    "output_dropout": 0.0,
    "use_sliding_window": False,
    "norm_head": False,
    "rope_interleaved": False,
}

_MTP = "num_nextn_predict_layers"
_HINTS = typing.get_type_hints(ModelConfig)
_log = logging.getLogger(__name__)


# ---- architecture --------------------------------------------------------------------------------


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a config.json describes.

    dtype and param_dtype are the file's torch_dtype (float32 where it has none).
    Raises: CheckpointError that names the field for whatever the model here does not implement.
    """
    if hf.get("model_type") not in MODEL_TYPES:
        raise _bad("model_type", hf.get("model_type"), f"known are {', '.join(MODEL_TYPES)}")
    _check_fixed(hf)
    values = {ours: _required(hf, name, _HINTS[ours]) for name, ours in _FIELDS.items()}
    for name, default in _DEFAULTS.items():
        value = _value(hf, name, _HINTS[name])
        values[name] = default if value is None else value
    head_dim = _head_dim(hf)
    dtype = _value(hf, "dtype", str) or _value(hf, "torch_dtype", str) or "float32"
    dtype = dtype.removeprefix("torch.")
    if dtype not in DTYPES:
        raise _bad("torch_dtype", dtype, f"use one of {', '.join(DTYPES)}")
    theta = _value(_rope(hf), "rope_theta", float)
    cfg = ModelConfig(
        **values,
        head_dim=head_dim,
        partial_rotary_factor=_rotary_factor(hf, head_dim),
        rope_theta=_required(hf, "rope_theta", float) if theta is None else theta,
        rope_scaling=_rope_scaling(hf),
        dtype=dtype,
        param_dtype=dtype,
    )
    check_model(cfg, "config.json: ", CheckpointError, _FIELD_OF)
    _check_restated(hf, cfg)
    return cfg


def mtp_layers(hf: Mapping[str, Any]) -> int:
    """How many multi-token prediction layers follow the others. Raises: CheckpointError."""
    return _value(hf, _MTP, int) or 0


def _bad(field: str, value: Any, way_out: str) -> CheckpointError:
    return CheckpointError(f"config.json: {field} is {value!r}; {way_out}")


def _value(hf: Mapping[str, Any], field: str, hint: type, group: str = "") -> Any:
    """The field, None where it is absent or null. Raises: CheckpointError for another type."""
    value = hf.get(field)
    if value is None:
        return None
    return typed.convert(hint, value, f"config.json: {group}{field}", CheckpointError)


def _required(hf: Mapping[str, Any], field: str, hint: type) -> Any:
    value = _value(hf, field, hint)
    if value is None:
        raise CheckpointError(f"config.json: the field {field!r} is missing")
    return value


def _check_fixed(hf: Mapping[str, Any]) -> None:
    for field, value in _FIXED.items():
        if hf.get(field) is not None and hf[field] != value:
            raise _bad(field, hf[field], f"only {value!r} is implemented")
    if hf.get("router_dtype") not in (None, "fp32", "float32"):
        raise _bad("router_dtype", hf["router_dtype"], "the router is always fp32")


def _head_dim(hf: Mapping[str, Any]) -> int:
    stated = _value(hf, "head_dim", int)
    if stated is not None:
        return stated
    hidden, heads = (_required(hf, name, int) for name in ("hidden_size", "num_attention_heads"))
    if heads < 1 or hidden % heads:
        raise CheckpointError(
            f"config.json: head_dim is missing, and hidden_size {hidden} is no multiple of "
            f"num_attention_heads {heads}"
        )
    return hidden // heads


def _check_restated(hf: Mapping[str, Any], cfg: ModelConfig) -> None:
    """What files say a second time in other words."""
    shared = _value(hf, "moe_shared_expert_intermediate_size", int)
    if shared is not None and cfg.num_shared_experts and shared != cfg.moe_intermediate_size:
        raise _bad(
            "moe_shared_expert_intermediate_size",
            shared,
            f"shared experts are as wide as the others, {cfg.moe_intermediate_size}",
        )
    rotary_dim = _value(hf, "rotary_dim", int)
    if rotary_dim is not None and rotary_dim != cfg.rotary_dim:
        product = f"{cfg.head_dim} · {cfg.partial_rotary_factor}"
        raise _bad("rotary_dim", rotary_dim, f"head_dim · partial_rotary_factor is {product}")


# ---- rotary embedding ----------------------------------------------------------------------------


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of new files, `rope_scaling` of old ones, {} where neither says anything.

    Some new files have both; they must agree then.
    """
    new, old = (_value(hf, name, dict) or {} for name in ("rope_parameters", "rope_scaling"))
    for key in set(new) & set(old):
        if new[key] != old[key]:
            raise _bad(f"rope_parameters.{key}", new[key], f"rope_scaling.{key} is {old[key]!r}")
    return {**old, **new}


def _rotary_factor(hf: Mapping[str, Any], head_dim: int) -> float:
    for place in (_rope(hf), hf):
        factor = _value(place, "partial_rotary_factor", float)
        if factor is not None:
            return factor
    rotary_dim = _value(hf, "rotary_dim", int)
    return 0.5 if rotary_dim is None or head_dim < 1 else rotary_dim / head_dim


_YARN_FIELDS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "beta_fast"),
    *("beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    "original_max_position_embeddings",
}


def _rope_scaling(hf: Mapping[str, Any]) -> RopeScaling | None:
    rope = _rope(hf)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise _bad("rope_scaling.rope_type", kind, "'default' and 'yarn' are implemented")
    unknown = sorted(set(rope) - _YARN_FIELDS)
    if unknown:
        raise CheckpointError(f"config.json: rope_scaling has unknown fields: {unknown}")
    if rope.get("truncate", True) is not True:
        raise _bad("rope_scaling.truncate", rope["truncate"], "only true is implemented")
    factor, original = _yarn_factor(hf, rope)
    return RopeScaling(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=_yarn(rope, "beta_fast") or 32.0,
        beta_slow=_yarn(rope, "beta_slow") or 1.0,
        attention_factor=_attention_factor(rope, factor),
    )


def _yarn(rope: Mapping[str, Any], field: str, hint: type = float) -> Any:
    """A number of rope_scaling, None where it is absent; Hugging Face takes 0 for absent too."""
    value = _value(rope, field, hint, "rope_scaling.")
    if value is not None and value < 0:
        raise _bad(f"rope_scaling.{field}", value, "it must not be negative")
    return value or None


def _yarn_factor(hf: Mapping[str, Any], rope: Mapping[str, Any]) -> tuple[float, int]:
    """The factor and the original context. As in Hugging Face's utilities, an explicit original
    context makes the factor the ratio of the two contexts, whatever `factor` says."""
    longest = _required(hf, "max_position_embeddings", int)
    stated = _yarn(rope, "factor")
    original = _yarn(rope, "original_max_position_embeddings", int)
    if original is None:
        if stated is None:
            raise CheckpointError("config.json: rope_scaling needs 'factor'")
        return stated, longest
    factor = longest / original
    if factor < 1:
        raise _bad(
            "max_position_embeddings",
            longest,
            f"it is the extended context, and YaRN's original context is {original} already; "
            f"set it to {original * (stated or 1):.0f}",
        )
    if stated is not None and not math.isclose(stated, factor):
        _log.warning(
            "config.json: rope_scaling.factor %s is not used: max_position_embeddings / "
            "original_max_position_embeddings is %s, and Hugging Face takes that",
            stated,
            factor,
        )
    return factor, original


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float | None:
    stated, mscale, all_dim = (
        _yarn(rope, name) for name in ("attention_factor", "mscale", "mscale_all_dim")
    )
    if stated is not None or mscale is None or all_dim is None:
        return stated
    scale = 0.1 * math.log(factor) if factor > 1 else 0.0
    return (scale * mscale + 1.0) / (scale * all_dim + 1.0)


# ---- and back ------------------------------------------------------------------------------------


def config_to_hf(
    cfg: ModelConfig,
    special: SpecialTokens,
    *,
    model_type: str = "llada2_moe",
    dtype: str | None = None,
    base: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A config.json for an architecture.

    base: the file that the model came with. Where it describes the same architecture it stays as
    it is (ids and dtype aside); otherwise the fields of `cfg` replace its own and the others stay.
    """
    base = dict(base or {})
    ours = base.get("model_type") == model_type
    if ours and same_architecture(config_from_hf(base), cfg):
        hf = base
    else:
        hf = _rebased(base, cfg, model_type)
    if _MTP in hf:
        hf[_MTP] = 0  # they were not read
    hf |= {"pad_token_id": special.pad, "eos_token_id": special.eos, "mask_token_id": special.mask}
    if special.bos is not None:
        hf["bos_token_id"] = special.bos
    hf.pop("dtype", None)
    hf["torch_dtype"] = dtype or hf.get("torch_dtype") or cfg.param_dtype
    return hf


def same_architecture(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether two configs describe one function: how it is computed and initialised aside."""
    left, right = (model_dict(c) | {"initializer_range": None} for c in (a, b))
    return left == right


def _rebased(base: dict[str, Any], cfg: ModelConfig, model_type: str) -> dict[str, Any]:
    if base.get("model_type") != model_type:
        base.pop("auto_map", None)  # it names the other architecture's Python files
    base.pop("rope_parameters", None)
    values = dataclasses.asdict(cfg)
    scaling = values["rope_scaling"]
    if scaling is not None:
        scaling = {"rope_type": "yarn", **{k: v for k, v in scaling.items() if v is not None}}
    return base | {
        "architectures": [MODEL_TYPES[model_type]],
        "model_type": model_type,
        **{name: values[ours] for name, ours in _FIELDS.items()},
        **{name: values[name] for name in _DEFAULTS},
        "head_dim": cfg.head_dim,
        "partial_rotary_factor": cfg.partial_rotary_factor,
        "rotary_dim": cfg.rotary_dim,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling,
        **{name: value for name, value in _FIXED.items() if name in _WRITTEN},
        "router_dtype": "fp32",
        _MTP: 0,
    }


_WRITTEN = {
    *("use_bias", "use_qkv_bias", "hidden_act", "score_function", "use_rmsnorm", "use_qk_norm"),
    *("moe_router_enable_expert_bias", "embedding_dropout", "attention_dropout", "output_dropout"),
}


# ---- special tokens ------------------------------------------------------------------------------


def special_tokens(
    hf: Mapping[str, Any],
    tokenizer_files: Mapping[str, str],
    *,
    mask_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
) -> SpecialTokens:
    """Ids with a meaning.

    mask: the tokenizer's `<|mask|>` (or mask_token), where the config's mask_token_id is the same,
    absent, or overruled by `mask_id`; where the tokenizer has none, `mask_id`, else the config's.
    eos, pad: explicit, else the config, else the tokenizer; one stands for
    the other where only one is named, as LLaDA2's eos is its pad.

    Raises: CheckpointError for no mask id at all, one that the tokenizer contradicts, a mask id
    that means something else (Ling's `<|role_end|>` sits on LLaDA2's), ids that are no integers or
    beyond the vocabulary, no eos and no pad, tokenizer files that cannot be read.
    """
    tokenizer = TokenizerInfo(tokenizer_files)
    eos = _first(eos_id, _token_id(hf, "eos_token_id"), tokenizer.id_of("eos_token"))
    pad = _first(pad_id, _token_id(hf, "pad_token_id"), tokenizer.id_of("pad_token"), eos)
    eos = _first(eos, pad)
    if eos is None or pad is None:
        raise CheckpointError("no eos id: config.json has neither eos_token_id nor pad_token_id")
    bos = _first(_token_id(hf, "bos_token_id"), tokenizer.id_of("bos_token"))
    mask = _mask_id(hf, tokenizer, mask_id)
    vocab = _required(hf, "vocab_size", int)
    for field, value in (("mask", mask), ("eos", eos), ("pad", pad), ("bos", bos)):
        if value is not None and not 0 <= value < vocab:
            raise CheckpointError(
                f"{field}_token_id {value} is beyond the vocabulary: vocab_size is {vocab}"
            )
    if mask in (eos, pad):
        name = "eos" if mask == eos else "pad"
        raise CheckpointError(
            f"mask id {mask} is the {name} token too: the mask needs an id of its own "
            "(Ling's chat tokenizers end a turn with LLaDA2's mask id)"
        )
    largest = tokenizer.largest_id
    if largest is not None and largest[0] >= vocab:
        raise CheckpointError(
            f"tokenizer.json: token {largest[1]!r} has id {largest[0]}, beyond the vocabulary: "
            f"vocab_size is {vocab}"
        )
    return SpecialTokens(mask=mask, eos=eos, pad=pad, bos=bos)


def _first(*ids: int | None) -> int | None:
    """The first id that is there."""
    return next((i for i in ids if i is not None), None)


def _token_id(hf: Mapping[str, Any], field: str) -> int | None:
    """An id of config.json; of a list of ids the first."""
    value = hf.get(field)
    return _value({field: value[0]} if isinstance(value, list) and value else hf, field, int)


def _mask_id(hf: Mapping[str, Any], tokenizer: TokenizerInfo, explicit: int | None) -> int:
    own, stated = tokenizer.mask_id, _token_id(hf, "mask_token_id")
    if own is not None:
        if explicit not in (None, own):
            raise CheckpointError(
                f"mask id {explicit} was asked for, but the tokenizer's {tokenizer.text(own)!r} "
                f"is {own} (and {explicit} is {tokenizer.text(explicit)!r}); drop --mask-id"
            )
        if explicit is None and stated not in (None, own):
            raise _bad(
                "mask_token_id",
                stated,
                f"the tokenizer's {tokenizer.text(own)!r} is {own}: if that is right, give "
                f"--mask-id {own}, else the model's own tokenizer by --tokenizer",
            )
        return own
    chosen = _first(explicit, stated)
    if chosen is None:
        raise CheckpointError(
            f"no mask id: the tokenizer has no {MASK_TOKEN} and config.json no mask_token_id; "
            "give --mask-id N, an id that no text uses"
        )
    if tokenizer.has_role(chosen):
        raise CheckpointError(
            f"mask id {chosen} is {tokenizer.text(chosen)!r} in this tokenizer: masking with it "
            "would hide what that token means. Give another, unused id by --mask-id, or the "
            "tokenizer of LLaDA2 by --tokenizer"
        )
    return chosen


class TokenizerInfo:
    """What the tokenizer files say about ids; knows nothing where there are none.

    Raises: CheckpointError for files that are not as the tokenizers library writes them.
    """

    def __init__(self, files: Mapping[str, str]):
        parsed = {name: _parse(files, name) for name in _TOKENIZER_JSON}
        try:
            self._read(*parsed.values())
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{', '.join(name for name in parsed if name in files)}: not as the tokenizers "
                f"library writes them, or damaged: {error!r}"
            ) from None

    def _read(self, tokenizer: dict, config: dict, special: dict) -> None:
        self._roles = special | {role: token for role, token in config.items() if token}
        self._added = {int(i): t for i, t in (config.get("added_tokens_decoder") or {}).items()}
        self._added |= {token["id"]: token for token in tokenizer.get("added_tokens") or []}
        vocab = (tokenizer.get("model") or {}).get("vocab") or {}
        if isinstance(vocab, list):  # Unigram: [[token, score], ...]
            vocab = {token: i for i, (token, _) in enumerate(vocab)}
        self._ids = dict(vocab) | {t["content"]: i for i, t in self._added.items()}
        for token, token_id in self._ids.items():
            if type(token) is not str or type(token_id) is not int:
                raise TypeError(f"the id of {token!r} is {token_id!r}")
        self._texts = {i: token for token, i in self._ids.items()}

    def text(self, token_id: int) -> str | None:
        return self._texts.get(token_id)

    def id_of(self, role: str) -> int | None:
        """The id of `eos_token` and the like."""
        token = self._roles.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        return self._ids.get(token) if isinstance(token, str) else None

    @property
    def mask_id(self) -> int | None:
        return _first(self._ids.get(MASK_TOKEN), self.id_of("mask_token"))

    @property
    def largest_id(self) -> tuple[int, str] | None:
        return max(self._texts.items(), default=None)

    def has_role(self, token_id: int) -> bool:
        """Whether a token structures text (eos, a role's end), rather than being free or a word."""
        token = self._added.get(token_id)
        if token is None or not token.get("special", False):
            return False
        free = ("mask", "reserved", "unused", "extra", "dummy", "placeholder")
        return not any(word in token["content"].lower() for word in free)


_TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def _parse(files: Mapping[str, str], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} holds a {type(value).__name__}, not a JSON object")
    return value
