"""config.json <-> ModelConfig: what is read, what is refused, what is written."""

import dataclasses
import json
import logging

import pytest

from llada2_jax.checkpoint import CheckpointError
from llada2_jax.hub.config import config_from_hf, config_to_hf, same_architecture, special_tokens
from llada2_jax.types import RopeScaling, SpecialTokens

MINI = {
    "model_type": "llada2_moe",
    "vocab_size": 157184,
    "hidden_size": 2048,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "rope_theta": 600000,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 16384,
    "pad_token_id": 156892,
    "torch_dtype": "bfloat16",
    "use_qk_norm": True,
    "score_function": "sigmoid",
}
SPECIAL = SpecialTokens(mask=156895, eos=156892, pad=156892)


def without(*fields):
    return {key: value for key, value in MINI.items() if key not in fields}


def test_mini_is_read():
    cfg = config_from_hf(MINI)
    assert (cfg.num_layers, cfg.num_heads, cfg.experts_per_token) == (20, 16, 8)
    assert (cfg.dtype, cfg.param_dtype, cfg.rope_theta) == ("bfloat16", "bfloat16", 600000.0)
    assert cfg.rope_scaling is None and cfg.rotary_dim == 64


@pytest.mark.parametrize("model_type", ["llada2_moe", "bailing_moe_v2", "llada2_moe_veomni"])
def test_architectures(model_type):
    assert config_from_hf(MINI | {"model_type": model_type}) == config_from_hf(MINI)


def test_head_dim_is_derived():
    assert config_from_hf(without("head_dim")).head_dim == 128


def test_new_style_rope_and_dtype():
    new = without("rope_theta", "partial_rotary_factor", "torch_dtype") | {
        "dtype": "bfloat16",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 600000,
            "partial_rotary_factor": 0.5,
        },
    }
    assert config_from_hf(new) == config_from_hf(MINI)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; known are llada2_moe"),
        ({"use_bias": True}, "use_bias is True"),
        ({"use_qkv_bias": True}, "use_qkv_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"score_function": "softmax"}, "score_function is 'softmax'"),
        ({"use_qk_norm": False}, "use_qk_norm is False"),
        ({"use_rmsnorm": False}, "use_rmsnorm is False"),
        ({"moe_router_enable_expert_bias": False}, "moe_router_enable_expert_bias is False"),
        ({"router_dtype": "bf16"}, "router_dtype is 'bf16'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
        ({"rotary_dim": 32}, "rotary_dim is 32"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 16; .* num_key_value_heads=3"),
        ({"n_group": 7}, "num_experts is 256; .* n_group=7"),
        ({"topk_group": 9}, "topk_group is 9"),
        ({"num_experts_per_tok": 200}, "num_experts_per_tok is 200"),
        ({"moe_shared_expert_intermediate_size": 7}, "moe_shared_expert_intermediate_size is 7"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, "rope_type is 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "needs 'factor'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "odd": 1}}, r"unknown fields: \['odd'\]"),
        ({"head_dim": None, "hidden_size": 2050}, "head_dim is missing"),
        ({"head_dim": None, "num_attention_heads": 0}, "no multiple of num_attention_heads 0"),
        ({"num_attention_heads": "16"}, "num_attention_heads='16' must be of type int"),
        ({"hidden_size": "abc"}, "hidden_size='abc' must be of type int"),
        ({"vocab_size": -5}, "vocab_size is -5; it must be positive"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5 must be of type int"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be of type bool"),
        ({"num_shared_experts": -1}, "num_shared_experts is -1; it must not be negative"),
        ({"rope_theta": "abc"}, "rope_theta='abc' must be of type float"),
        ({"rope_scaling": [2]}, r"rope_scaling=\[2\] must be of type dict"),
        (
            {"rope_scaling": {"type": "yarn", "factor": "2"}},
            "rope_scaling.factor='2' must be of type float",
        ),
    ],
)
def test_what_is_not_implemented_is_an_error_that_names_it(change, message):
    with pytest.raises(CheckpointError, match=message):
        config_from_hf(MINI | change)


@pytest.mark.parametrize("field", ["vocab_size", "n_group", "num_shared_experts", "rope_theta"])
def test_missing_fields_are_named(field):
    with pytest.raises(CheckpointError, match=f"'{field}' is missing"):
        config_from_hf(without(field))


# ---- YaRN ----------------------------------------------------------------------------------------


def yarn(longest: int, **scaling):
    hf = MINI | {"max_position_embeddings": longest}
    return config_from_hf(hf | {"rope_scaling": {"rope_type": "yarn"} | scaling}).rope_scaling


def test_yarn_without_an_original_context_stretches_the_config():
    assert yarn(32768, factor=2.0) == RopeScaling(2.0, 32768)


def test_an_explicit_original_context_makes_the_factor(caplog):
    with caplog.at_level(logging.WARNING):
        scaling = yarn(65536, factor=4.0, original_max_position_embeddings=32768)
    assert scaling == RopeScaling(2.0, 32768)
    assert "rope_scaling.factor 4.0 is not used" in caplog.text


def test_an_original_context_beyond_the_extended_one():
    with pytest.raises(CheckpointError, match="set it to 65536"):
        yarn(16384, factor=2.0, original_max_position_embeddings=32768)


def test_attention_factor():
    assert yarn(65536, factor=2.0, attention_factor=1.5).attention_factor == 1.5
    scaling = yarn(65536, factor=2.0, mscale=1.0, mscale_all_dim=1.0)
    assert scaling.attention_factor == 1.0


# ---- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [None, RopeScaling(4.0, 32768, attention_factor=1.2)])
@pytest.mark.parametrize("model_type", ["llada2_moe", "bailing_moe_v2"])
def test_what_is_written_reads_back(scaling, model_type):
    cfg = dataclasses.replace(
        config_from_hf(MINI), rope_scaling=scaling, max_position_embeddings=131072
    )
    hf = json.loads(json.dumps(config_to_hf(cfg, SPECIAL, model_type=model_type)))
    assert config_from_hf(hf) == cfg
    assert special_tokens(hf, {}) == SPECIAL
    assert hf["model_type"] == model_type


def test_a_base_that_fits_is_kept_and_one_that_does_not_is_corrected():
    base = MINI | {"theirs": 1, "auto_map": {"AutoModel": "x.Y"}}
    cfg = config_from_hf(MINI)
    ids = {"mask_token_id": 156895, "eos_token_id": 156892}
    assert config_to_hf(cfg, SPECIAL, base=base) == base | ids
    longer = dataclasses.replace(cfg, max_position_embeddings=32768)
    hf = config_to_hf(longer, SPECIAL, base=base)
    assert same_architecture(config_from_hf(hf), longer)
    assert hf["theirs"] == 1 and "auto_map" in hf
    assert "auto_map" not in config_to_hf(cfg, SPECIAL, base=base, model_type="bailing_moe_v2")


# ---- special tokens ------------------------------------------------------------------------------

# The trap: Ling's chat tokenizers end a turn with what is LLaDA2's mask id.
LING_CHAT = {
    "tokenizer.json": json.dumps(
        {
            "model": {"vocab": {}},
            "added_tokens": [
                {"id": 156892, "content": "<|endoftext|>", "special": True},
                {"id": 156895, "content": "<|role_end|>", "special": True},
            ],
        }
    ),
    "tokenizer_config.json": json.dumps({"eos_token": "<|role_end|>"}),
}


def test_ids_of_the_config():
    assert special_tokens(MINI | {"mask_token_id": 156895, "bos_token_id": 156891}, {}) == (
        dataclasses.replace(SPECIAL, bos=156891)
    )


def test_lings_role_end_is_not_taken_for_the_mask():
    with pytest.raises(CheckpointError, match=r"156895 is '<\|role_end\|>'.*--tokenizer"):
        special_tokens(MINI, LING_CHAT, mask_id=156895)
    with pytest.raises(CheckpointError, match=r"156895 is '<\|role_end\|>'"):
        special_tokens(MINI | {"mask_token_id": 156895}, LING_CHAT)
    free = special_tokens(MINI, LING_CHAT, mask_id=157000)
    assert free.mask == 157000


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({}, "no mask id"),
        ({"mask_id": 157184}, "mask_token_id 157184 is beyond the vocabulary"),
        ({"mask_id": 1, "eos_id": -1}, "eos_token_id -1 is beyond"),
        ({"mask_id": 156892}, "mask id 156892 is the eos token too"),
    ],
)
def test_ids_that_cannot_be(ids, message):
    with pytest.raises(CheckpointError, match=message):
        special_tokens(MINI, {}, **ids)


def test_the_config_and_the_tokenizer_agree_about_the_mask():
    files = {"tokenizer.json": json.dumps({"added_tokens": [{"id": 5, "content": "<|mask|>"}]})}
    for agreeing in (MINI, MINI | {"mask_token_id": 5}):
        assert special_tokens(agreeing, files).mask == 5
    with pytest.raises(CheckpointError, match=r"mask_token_id is 7; .*is 5.*--mask-id 5"):
        special_tokens(MINI | {"mask_token_id": 7}, files)
    assert special_tokens(MINI | {"mask_token_id": 7}, files, mask_id=5).mask == 5


@pytest.mark.parametrize("field", ["mask", "eos", "pad", "bos"])
@pytest.mark.parametrize("value", ["5", 5.0, True, [], ["5"]])
def test_an_id_is_an_integer(field, value):
    with pytest.raises(CheckpointError, match=rf"config\.json: {field}_token_id=.*type int"):
        special_tokens(MINI | {f"{field}_token_id": value}, {}, mask_id=1)


def test_no_eos_at_all():
    with pytest.raises(CheckpointError, match="no eos id"):
        special_tokens(without("pad_token_id"), {}, mask_id=1)


def test_a_token_beyond_the_vocabulary():
    with pytest.raises(CheckpointError, match=r"'<\|role_end\|>' has id 156895, beyond"):
        special_tokens(MINI | {"vocab_size": 156893}, LING_CHAT, mask_id=5, eos_id=3)
