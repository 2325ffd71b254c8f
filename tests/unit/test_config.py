"""Configs: what is declared is used, and everything else is an error that names it."""

import dataclasses
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from llada2_jax import cli, config_check
from llada2_jax.assets import TINY_AR
from llada2_jax.config import (
    ConfigError,
    DataConfig,
    Phase,
    ScheduleConfig,
    StepConfig,
    TrainConfig,
    default_config,
    load_config,
    model_dict,
)
from llada2_jax.config_check import validate
from llada2_jax.hub import load_bundle, param_shapes
from llada2_jax.plan import planned_model
from llada2_jax.quickstart import read_config
from llada2_jax.schedules import embedding_noise_sigma
from llada2_jax.starting_model import starting_bundle
from llada2_jax.train_step import abstract_state, make_context, make_train_step
from llada2_jax.types import Batch, ModelConfig, RopeScaling
from tests.helpers import TINY
from tests.helpers import config as tiny

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
POSTTRAINING = [ROOT / "configs" / f"{stage}.py" for stage in ("sft", "cap", "dpo")]
LARGE = ("mini", "flash")


def make(**fields):
    """The smallest config that can be run, with changes such as `data__row_length=3`."""
    config = default_config()
    config.workdir = "runs/x"
    config.data.row_length = 32
    config.schedule.ar_tokens = 1000
    with config.unlocked():
        config.model = {k: v for k, v in model_dict(TINY).items() if v is not None}
        for name, value in fields.items():
            *groups, field = name.split("__")
            part = config
            for group in groups:
                part = part[group]
            del part[field]
            part[field] = value
    return config


def test_the_smallest_config_is_valid():
    cfg = validate(make())
    assert cfg.phases == (Phase("ar", "ar", 1, 1000),)
    assert cfg.tokens_per_step == 32 * 16 and cfg.total_steps == 2  # rounded up to whole steps


def test_a_default_config_is_locked():
    with pytest.raises(AttributeError, match="learning_rat"):
        default_config().optimizer.learning_rat = 1.0


@pytest.mark.parametrize("place", ["", "optimizer", "data", "noise"])
def test_an_unknown_field_is_named(place):
    config = make()
    with config.unlocked():
        (config[place] if place else config).surprise = 1
    where = f"config.{place}" if place else "config"
    with pytest.raises(ConfigError, match=rf"^{where}\.surprise is not a field; {where} has: "):
        validate(config)


WRONG = {
    "data__source": ("gs://bucket/x", r"config\.data\.source: 'gs://bucket/x' is a URL"),
    "data__sources": (("a", "gs://bucket/x"), r"config\.data\.sources: 'gs://.* is a URL"),
    "log_every": ("ten", r"config\.log_every='ten' must be of type int"),
    "eval__rows": (True, r"config\.eval\.rows=True must be of type int"),
    "data__document_mask": (1, r"config\.data\.document_mask=1 must be of type bool"),
    "data__row_length": (32.0, r"config\.data\.row_length=32\.0 must be of type int"),
    "optimizer__learning_rate": ("1", r"learning_rate='1' must be of type float"),
    "schedule__warmup_blocks": ((1, "4"), r"warmup_blocks\[1\]='4' must be of type int"),
    "noise": (3, r"config\.noise=3 must be a group of fields"),
    "noise__group": ("word", r"config\.noise\.group='word': choose one of"),
    "data__block_anchor": ("page", r"config\.data\.block_anchor='page': choose one of"),
    "runtime__dtype": ("float16", r"config\.runtime\.dtype='float16': choose one of"),
    "data__rows_per_step": (0, r"config\.data\.rows_per_step=0 must be positive"),
    "workdir": ("", r"config\.workdir is empty"),
    "schedule__ar_tokens": (0, r"config\.schedule has no stage with tokens"),
    "optimizer__accumulate": (3, r"rows_per_step=16 is not a multiple of"),
    "seed": (-1, r"config\.seed=-1 must be from 0 to 2\*\*32 - 1"),
    "optimizer__clip_norm": (-1, r"config\.optimizer\.clip_norm=-1\.0 must not be negative"),
    "optimizer__weight_decay": (-0.1, r"weight_decay=-0\.1 must not be negative"),
    "optimizer__expert_bias_rate": (-1e-3, r"expert_bias_rate=-0\.001 must not be negative"),
    "optimizer__eps": (0, r"config\.optimizer\.eps=0\.0 must be positive"),
    "optimizer__b1": (-0.1, r"config\.optimizer\.b1=-0\.1 must be at least 0 and below 1"),
    "optimizer__b2": (1, r"config\.optimizer\.b2=1\.0 must be at least 0 and below 1"),
    "noise__edit_rate": (1.5, r"config\.noise\.edit_rate=1\.5 must be from 0 to 1"),
    "noise__later_turns": ("drop", r"config\.noise\.later_turns='drop': choose one of"),
    "cap__weight": (-0.1, r"config\.cap\.weight=-0\.1 must not be negative"),
    "cap__temperature": (0.0, r"config\.cap\.temperature=0\.0 must be positive"),
    "schedule__warmup_tokens": (8, r"warmup_tokens=8, but config\.schedule\.warmup_blocks is e"),
    "schedule__decay_blocks": ((4,), r"decay_blocks=\(4,\), but config\.schedule\.decay_tokens"),
    "embedding_noise__sigma": (0.1, r"sigma=0\.1 and tokens=0 belong together"),
    "embedding_noise__tokens": (8, r"sigma=0\.0 and tokens=8 belong together"),
    "data__random_length_fraction": (1.5, r"random_length_fraction=1\.5 must be from 0 to 1"),
    "optimizer__warmup_fraction": (-0.1, r"warmup_fraction=-0\.1 must be from 0 to 1"),
    "optimizer__decay_fraction": (2, r"decay_fraction=2\.0 must be from 0 to 1"),
    "optimizer__final_fraction": (1.1, r"final_fraction=1\.1 must be from 0 to 1"),
    "eval__target_block_size": (5, r"target_block_size=5 must divide config\.data\.row_length=32"),
}


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_value_is_named(field):
    value, message = WRONG[field]
    with pytest.raises(ConfigError, match=message):
        validate(make(**{field: value}))


# What a DPO run needs, and what it does not take.
DPO = {
    "schedule__ar_tokens": 0,
    "schedule__dpo_tokens": 1000,
    "model": {},
    "init__checkpoint": "somewhere",
    "data__sources": ("pairs",),
    "data__packing": "best_fit",
}
WRONG_DPO = {
    "dpo__beta": (-0.1, r"config\.dpo\.beta=-0\.1 must be positive"),
    "dpo__samples": (0, r"config\.dpo\.samples=0 must be positive"),
    "dpo__antithetic": (True, r"config\.dpo\.samples=1 must be even"),
    "reference__memory": ("disk", r"config\.reference\.memory='disk': choose one of"),
    "schedule__ar_tokens": (9, r"dpo_tokens: its rows are preference pairs, which no other stage"),
    "schedule__posttrain_block": (24, r"must be a multiple of each block size \(24\)"),
    "data__packing": ("concat", r"dpo_tokens: name preference pairs in config\.data\.sources"),
    "data__sources": ((), r"dpo_tokens: name preference pairs in config\.data\.sources"),
    "noise__weight": ("flat", r"config\.noise: dpo compares bounds .*weight='elbo'"),
    "noise__edit_rate": (0.1, r"config\.noise: dpo compares bounds .*edit_rate=0"),
    "noise__later_turns": ("hide", r"config\.noise: dpo compares bounds .*later_turns='learn'"),
    "noise__draw": ("bernoulli", r"dpo compares bounds .*'bernoulli' with t_min=0 and t_max=1"),
}


@pytest.mark.parametrize("field", WRONG_DPO)
def test_a_wrong_value_for_dpo_is_named(field):
    value, message = WRONG_DPO[field]
    assert validate(make(**DPO)).phases == (Phase("dpo", "dpo", 32, 1000),)
    with pytest.raises(ConfigError, match=message):
        validate(make(**DPO | {field: value}))


def test_dpo_takes_every_noise_that_gives_the_bound():
    """tests/unit/test_dpo.py has the enumeration of each."""
    bernoulli = {"noise__draw": "bernoulli", "noise__t_min": 0.0}
    for noise in (bernoulli, {"noise__complementary": True}, {"noise__group": "sequence"}):
        assert validate(make(**DPO | noise)).phases[0].objective == "dpo"


CHECKPOINT = {"model": {}, "init__checkpoint": "somewhere"}
SOURCES = {"data__sources": ("a", "b")}
DIFFUSION = {"schedule__stable_tokens": 1000}
# What is not read: (field, value), what the run is besides, where it is not read, and a run that
# reads it.
UNREAD = [
    ("init__mask_id", 3, {}, "config.model is set", CHECKPOINT),
    ("init__mask_embedding", "mean", {}, "config.model is set", CHECKPOINT),
    ("data__tokenizer", "a", CHECKPOINT, "config.init.checkpoint is set", {}),
    ("data__source", "a", SOURCES, "config.data.sources is set", {}),
    ("data__weights", (1.0,), {"data__sources": ("a",)}, "less than two folders", None),
    ("noise__later_turns", "hide", DIFFUSION, "data.sources is empty", DIFFUSION | SOURCES),
    ("data__pad_multiple", 16, {}, "packing='concat'", {"data__packing": "best_fit"}),
    ("data__long_documents", "split", {}, "packing='concat'", {"data__packing": "best_fit"}),
    ("data__document_mask", False, {"data__packing": "best_fit"}, "packing='best_fit'", {}),
    ("data__random_length_fraction", 0.1, {"data__packing": "best_fit"}, "='best_fit'", {}),
    ("schedule__posttrain_block", 16, {}, "sft_tokens, cap", {"schedule__sft_tokens": 9}),
    ("cap__weight", 1.0, {}, "cap_tokens is 0", {"schedule__cap_tokens": 9}),
    ("dpo__beta", 0.5, {}, "dpo_tokens is 0", DPO),
    ("reference__cache", "file", {}, "dpo_tokens is 0", DPO),
    ("reference__memory", "host", DPO | {"reference__cache": "file"}, "cache is set", DPO),
    ("reference__mask_id", 3, DPO, "checkpoint is empty", DPO | {"reference__checkpoint": "a"}),
    ("lora__alpha", 8.0, {}, "lora.rank is 0", CHECKPOINT | {"lora__rank": 2}),
    ("noise__t_min", 0.3, DIFFUSION, "draw='count'", DIFFUSION | {"noise__draw": "bernoulli"}),
    ("noise__edit_weight", 0.5, DIFFUSION, "edit_rate is 0", DIFFUSION | {"noise__edit_rate": 0.1}),
    (
        *("optimizer__learning_rate", 0.1),
        CHECKPOINT | {"optimizer__learning_rate_from_start": True},
        *("learning_rate_from_start is set", {}),
    ),
    (
        *("optimizer__rounding", "nearest", {}, "param_dtype='float32'"),
        {"runtime__param_dtype": "bfloat16"},
    ),
    ("optimizer__reset_each_phase", True, {}, "one phase", DIFFUSION),
    (
        *("spikes__max_rollbacks", 3, {"spikes__loss": "skip"}, "spikes is 'rollback'"),
        {"spikes__loss": "rollback"},
    ),
    ("distributed__start_seconds", 9, {"distributed__enabled": False}, "enabled=False", {}),
    ("distributed__heartbeat_seconds", 9, {"distributed__enabled": False}, "enabled=False", {}),
    ("eval__rate_buckets", 8, DPO, "dpo_tokens is set", DIFFUSION),
    ("eval__target_block_size", 4, DPO, "dpo_tokens is set", DIFFUSION),
    ("noise__group", "sequence", {}, "an autoregressive run", DIFFUSION),
    ("noise__low_discrepancy", False, {}, "an autoregressive run", DIFFUSION),
    ("noise__complementary", True, {}, "an autoregressive run", DIFFUSION),
    ("noise__edit_rate", 0.1, {}, "an autoregressive run", DIFFUSION),
    ("data__block_anchor", "row", {}, "an autoregressive run", DIFFUSION),
    ("eval__samples", 2, {}, "an autoregressive run", DIFFUSION),
    ("eval__rate_buckets", 8, {}, "an autoregressive run", DIFFUSION),
    ("eval__target_block_size", 4, {}, "an autoregressive run", DIFFUSION),
]


@pytest.mark.parametrize(
    ("field", "value", "run", "where", "read"), UNREAD, ids=[f"{c[0]}-{c[3]}" for c in UNREAD]
)
def test_a_field_that_nothing_reads_is_an_error(field, value, run, where, read):
    path, changed = re.escape(field.replace("__", ".")), {field: value}
    message = rf"^config\.{path}={re.escape(repr(value))} is not read .*{where}.*: leave it at "
    validate(make(**run))
    with pytest.raises(ConfigError, match=message):
        validate(make(**run | changed))
    if read is not None:
        validate(make(**read | changed))


def test_every_number_is_bounded():
    """By the table of bounds, or by a check of its own that the other tests of this file fail."""
    others = {"init.mask_id", "reference.mask_id", "lora.alpha", "schedule.posttrain_block"}
    bounded = others | {path for *_, fields in config_check._BOUNDS for path in fields}
    for group in dataclasses.fields(TrainConfig):
        value = getattr(TrainConfig(), group.name)
        parts = vars(value) if dataclasses.is_dataclass(value) else {"": value}
        for name, number in parts.items():
            path = f"{group.name}.{name}".rstrip(".")
            if type(number) in (int, float) and group.name != "mesh":
                assert path in bounded, path


def test_the_learning_rate_comes_down_within_the_run():
    fields = {"optimizer__warmup_fraction": 0.3, "optimizer__decay_fraction": 0.8}
    with pytest.raises(ConfigError, match=r"warmup_fraction=0\.3 and decay_fraction=0\.8 are more"):
        validate(make(**fields))
    validate(make(**fields | {"optimizer__decay_fraction": 0.7}))


@pytest.mark.parametrize("stage", ["warmup", "decay"])
@pytest.mark.parametrize("block", [0, 5, 64])
def test_a_block_must_divide_the_row(stage, block):
    fields = {f"schedule__{stage}_blocks": (4, block), f"schedule__{stage}_tokens": 100}
    message = rf"{stage}_blocks: {block} must divide config\.data\.row_length=32"
    with pytest.raises(ConfigError, match=message):
        validate(make(**fields))


def test_a_range_of_rates():
    fields = {"noise__draw": "bernoulli", "noise__t_min": 0.3, "noise__t_max": 0.8}
    fields["schedule__stable_tokens"] = 1000
    assert validate(make(**fields)).noise.t_max == 0.8
    with pytest.raises(ConfigError, match="need t_min < t_max, got 0.9, 0.8"):
        validate(make(**fields | {"noise__t_min": 0.9}))


def test_embedding_noise_is_for_masks():
    fields = {"embedding_noise__sigma": 0.1, "embedding_noise__tokens": 8}
    with pytest.raises(ConfigError, match=r"embedding_noise\.sigma=0\.1 is not read in an autore"):
        validate(make(**fields))
    validate(make(**fields, schedule__stable_tokens=1000))
    validate(make(eval__rate_buckets=0))  # off, as it is anyway


def test_the_inverse_of_a_pair_has_a_rate_above_zero():
    fields = {"noise__draw": "bernoulli", "noise__complementary": True}
    fields["schedule__stable_tokens"] = 1000
    with pytest.raises(ConfigError, match=r"t_max=1\.0: the inverse of a complementary pair"):
        validate(make(**fields))
    validate(make(**fields, noise__weight="flat"))
    validate(make(**fields, noise__t_max=0.8))


def test_stages_of_post_training():
    stages = {"schedule__ar_tokens": 0, "schedule__sft_tokens": 900, "schedule__cap_tokens": 800}
    cfg = validate(make(**stages, schedule__posttrain_block=8, cap__weight=0.5))
    assert cfg.phases == (Phase("sft", "bdlm", 8, 900), Phase("cap", "cap", 8, 800))
    with pytest.raises(ConfigError, match=r"posttrain_block: 5 must divide config\.data\.row_le"):
        validate(make(**stages, schedule__posttrain_block=5))
    packed = {"data__packing": "best_fit", "data__pad_multiple": 16}
    with pytest.raises(ConfigError, match=r"pad_multiple=16 must be a multiple of each block size"):
        validate(make(**stages, **packed, schedule__posttrain_block=32))


def test_exactly_one_of_checkpoint_and_model():
    message = r"exactly one of config\.init\.checkpoint .* and config\.model"
    with pytest.raises(ConfigError, match=message):
        validate(make(init__checkpoint="somewhere"))
    with pytest.raises(ConfigError, match=message):
        validate(make(model={}))
    assert validate(make(model={}, init__checkpoint="somewhere")).model == {}


@pytest.mark.parametrize("field", ["sigma", "tokens"])
def test_noise_is_not_negative(field):
    fields = {"embedding_noise__sigma": 0.1, "embedding_noise__tokens": 8}
    fields[f"embedding_noise__{field}"] = -1
    with pytest.raises(ConfigError, match=rf"embedding_noise\.{field}=-1.* must not be negative"):
        validate(make(**fields))


YARN = {"factor": 2.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_group": 3}, r"config\.model\.num_experts is 4; .* n_group=3"),
        ({"num_heads": 3, "num_kv_heads": 2}, "num_heads is 3; .* num_kv_heads=2"),
        ({"topk_group": 9}, "topk_group is 9; it must be at most n_group=2"),
        ({"experts_per_token": 99}, "experts_per_token is 99; .* among 2 experts"),
        ({"initializer_range": -1.0}, "initializer_range is -1.0; it must not be negative"),
        ({"hidden_size": "16"}, "hidden_size='16' must be of type int"),
        ({"partial_rotary_factor": 0.1}, "partial_rotary_factor is 0.1; .* head_dim=8"),
        ({"rope_theta": 1}, "rope_theta is 1.0; it must be more than 1"),
        ({"rope_scaling": {}}, r"config\.model\.rope_scaling\.factor is missing"),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "beta_fast is 0.5; .* beta_slow=1.0"),
        ({"hidden": 16}, r"config\.model\.hidden is not a field"),
        ({"remat": "full"}, r"config\.model\.remat is not read: set config\.runtime\.remat"),
    ],
)
def test_a_model_that_cannot_be_is_named(change, message):
    config = make()
    with config.unlocked():
        config.model = config.model.to_dict() | change
    with pytest.raises(ConfigError, match=message):
        validate(config)


def test_a_configured_model_has_its_types():
    config = make()
    with config.unlocked():
        config.model.rope_scaling = YARN
    cfg = validate(config)
    assert planned_model(cfg).rope_scaling == RopeScaling(2.0, 8192)


def test_rows_fit_the_models_positions():
    short = model_dict(tiny(max_position_embeddings=16))
    cfg = validate(make(model={k: v for k, v in short.items() if v is not None}))
    message = r"data\.row_length=32 is beyond the model's max_position_embeddings=16"
    with pytest.raises(ConfigError, match=message):
        starting_bundle(cfg)


def test_an_integer_will_do_for_a_float():
    rate = validate(make(optimizer__weight_decay=0)).optimizer.weight_decay
    assert rate == 0.0 and isinstance(rate, float)


# ----------------------------------------------------------------------------------- schedule

WSD = ScheduleConfig(
    ar_tokens=100,
    warmup_blocks=(1, 4, 32),
    warmup_tokens=300,
    stable_tokens=400,
    decay_blocks=(8, 4),
    decay_tokens=200,
)


def test_warmup_stable_decay():
    assert WSD.phases(32) == (
        Phase("ar", "ar", 1, 100),
        Phase("warmup-1", "bdlm", 1, 100),
        Phase("warmup-4", "bdlm", 4, 100),
        Phase("warmup-32", "mdlm", 32, 100),  # one block a row needs no clean half
        Phase("stable-32", "mdlm", 32, 400),
        Phase("decay-8", "bdlm", 8, 100),
        Phase("decay-4", "bdlm", 4, 100),
    )


def test_arms_of_a_comparison_cost_the_same():
    """Direct switch, abrupt and stepwise decay, scaled to one budget."""
    stable = {"stable_tokens": 400, "total_tokens": 5000}
    direct = ScheduleConfig(**stable)
    abrupt = ScheduleConfig(**stable, decay_blocks=(4,), decay_tokens=200)
    stepwise = ScheduleConfig(**stable, decay_blocks=(16, 4), decay_tokens=200)
    assert [p.name for p in direct.phases(32)] == ["stable-32"]
    assert [p.name for p in abrupt.phases(32)] == ["stable-32", "decay-4"]
    assert [p.name for p in stepwise.phases(32)] == ["stable-32", "decay-16", "decay-4"]
    for arm in (direct, abrupt, stepwise):
        assert sum(p.tokens for p in arm.phases(32)) == 5000
        run = TrainConfig(schedule=arm, data=DataConfig(row_length=32, rows_per_step=1))
        assert run.total_steps == 157
    tokens = {p.name: p.tokens for p in abrupt.phases(32)}
    assert tokens["stable-32"] == pytest.approx(2 * tokens["decay-4"], abs=2)


@pytest.mark.parametrize("tokens", [1, 32, 33, 320])
def test_every_phase_takes_a_step_and_none_more_than_the_budget(tokens):
    """However short the phases are, wherever in the run they stand."""
    arms = [
        ScheduleConfig(ar_tokens=9, decay_blocks=(16, 8, 4), decay_tokens=1),
        ScheduleConfig(ar_tokens=1, decay_blocks=(16, 8, 4), decay_tokens=9),
    ]
    for arm in arms:
        arm = dataclasses.replace(arm, total_tokens=tokens)
        run = TrainConfig(schedule=arm, data=DataConfig(row_length=32, rows_per_step=1))
        assert [run.phase_at(end - 1)[0] for end in run.phase_ends] == [0, 1, 2, 3]
        assert run.total_steps == max(4, -(-tokens // 32))


def test_phases_follow_each_other_step_by_step():
    fields = {
        "data__rows_per_step": 1,
        "schedule__ar_tokens": 40,  # two steps of 32
        "schedule__stable_tokens": 64,
        "schedule__decay_blocks": (4,),
        "schedule__decay_tokens": 32,
        "embedding_noise__sigma": 0.5,
        "embedding_noise__tokens": 64,
    }
    cfg = validate(make(**fields))
    names = [cfg.phase_at(step)[1].name for step in range(cfg.total_steps + 2)]
    assert names == ["ar", "ar", "stable-32", "stable-32", "decay-4", "decay-4", "decay-4"]
    assert [cfg.phase_at(step)[0] for step in (0, 2, 4)] == [0, 1, 2]
    sigmas = [embedding_noise_sigma(cfg, step) for step in range(5)]
    assert sigmas == [0.0, 0.0, 0.5, 0.25, 0.0]


# --------------------------------------------------------------------------------- the command


# ml_collections loads config files in a way that Python 3.12 deprecates.
load_module = pytest.mark.filterwarnings(
    r"ignore:the load_module\(\) method is deprecated:DeprecationWarning"
)


@load_module
@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--config.optimizer.learning_rat=1", "learning_rat"),
        ("--config.surprise=1", "surprise"),
        ("--config.model.surprise=1", "surprise"),
        ("--surprise=1", "surprise"),
        ("--config.seed=abc", "seed"),
        ("--config.noise.group=word", "config.noise.group='word'"),
    ],
)
def test_the_command_names_a_wrong_override(argument, named, tmp_path, capsys):
    file = f"--config={ROOT / 'configs' / 'tiny_ar.py'}"
    assert cli.main(["train", file, f"--workdir={tmp_path / 'run'}", argument]) != 0
    error = capsys.readouterr().err
    assert error.startswith("llada2 train: error: ") and named in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


@load_module
def test_the_parent_of_a_quickstart_that_trains_none_is_not_configured(tmp_path, capsys):
    file = f"--config={ROOT / 'configs' / 'quickstart.py'}"
    override = "--config.parent.optimizer.learning_rate=1.0"
    assert cli.main(["quickstart", file, f"--workdir={tmp_path / 'run'}", override]) == 2
    error = capsys.readouterr().err
    assert "config.parent is not read where config.train_parent=False" in error
    argv = ["quickstart", file, override, "--config.train_parent", "--print_config"]
    assert cli.main(argv) == 0 and not (tmp_path / "run").exists()


@load_module
def test_quickstart_names_a_wrong_override(tmp_path, capsys):
    """Its config holds others, which are locked too."""
    file = f"--config={ROOT / 'configs' / 'quickstart.py'}"
    argv = ["quickstart", file, f"--workdir={tmp_path / 'run'}"]
    for group in ("", "report.", "conversion.optimizer."):
        assert cli.main([*argv, f"--config.{group}surprise=1"]) == 2
        error = capsys.readouterr().err
        assert error == "llada2 quickstart: error: the config has no field 'surprise'\n"
    assert not (tmp_path / "run").exists()


@load_module
@pytest.mark.parametrize("command", ["train", "quickstart"])
def test_print_config_shows_overrides_and_stops(command, tmp_path, capsys):
    name = {"train": "tiny_ar.py", "quickstart": "quickstart.py"}[command]
    file, place = f"--config={ROOT / 'configs' / name}", tmp_path / "run"
    assert cli.main([command, file, "--print_config", f"--workdir={place}"]) == 0
    assert f"workdir: {place}" in capsys.readouterr().out and not place.exists()


@load_module
@pytest.mark.parametrize("argv", [[], ["--config=/nowhere/config.py"], ["--workdir=x"]])
def test_the_command_says_what_config_it_needs(argv, capsys):
    assert cli.main(["train", *argv]) != 0
    output = capsys.readouterr()
    assert "config" in output.out + output.err and "Traceback" not in output.err


def test_help_has_examples(capsys):
    assert cli.main(["train", "--help"]) == 0
    assert "llada2 train --config=configs/" in capsys.readouterr().out


# -------------------------------------------------------------------------------- shipped files


def training_configs() -> list:
    """Every training config of configs/: the files, and the stages that a quickstart holds."""
    found = []
    for path, model in [*((p, None) for p in CONFIGS), *itertools.product(POSTTRAINING, LARGE)]:
        config = load_config(path, model)
        if "schedule" in config:
            found.append(pytest.param(config, id=f"{path.stem}{model or ''}"))
            continue
        parts = {k: v for k, v in config.items() if isinstance(v, ConfigDict) and "schedule" in v}
        found += [pytest.param(part, id=f"{path.stem}.{name}") for name, part in parts.items()]
    return found


def shipped_model(config) -> tuple[TrainConfig, ModelConfig]:
    """The config validated, and the architecture it trains; what starts from another run's model
    starts from the quickstart's."""
    config = config.copy_and_resolve_references()
    if not config.init.checkpoint:
        config.data.tokenizer = "a folder"
    cfg = validate(config)
    if cfg.init.architecture:
        return cfg, planned_model(cfg)
    start = TINY_AR if cfg.init.checkpoint.startswith("runs/") else cfg.init.checkpoint
    model = load_bundle(start).config if start else ModelConfig(**cfg.model)
    return cfg, dataclasses.replace(model, **dataclasses.asdict(cfg.runtime))


@pytest.mark.parametrize("config", training_configs())
def test_shipped_configs_are_valid(config):
    cfg, model = shipped_model(config)
    assert cfg.total_steps > 0 and cfg.workdir.startswith("runs/")
    assert cfg.data.row_length <= model.max_position_embeddings
    assert cfg.eval.rows % (cfg.data.rows_per_step // cfg.optimizer.accumulate) == 0


def without_rates(cfg: StepConfig) -> StepConfig:
    """Steps that differ in learning rates alone are traced once."""
    rates = {"learning_rate": 1.0, "warmup_fraction": 0.0, "decay_fraction": 0.0}
    optimizer = dataclasses.replace(cfg.optimizer, **rates, final_fraction=1.0)
    return dataclasses.replace(cfg, optimizer=optimizer, total_steps=1)


@pytest.mark.parametrize("config", training_configs())
def test_a_step_of_a_shipped_config_keeps_the_shapes_of_its_state(config):
    """Traced, not run: shapes and dtypes of every phase's step."""
    cfg, model = shipped_model(config)
    state = abstract_state(cfg.of_step, model)
    shape = (cfg.data.rows_per_step, cfg.data.row_length)
    ints = jax.ShapeDtypeStruct(shape, jnp.int32)
    fields = dict.fromkeys((f.name for f in dataclasses.fields(Batch)), ints)
    floats = jax.ShapeDtypeStruct(shape, jnp.float32)
    fields |= {"loss_mask": jax.ShapeDtypeStruct(shape, jnp.bool)}
    batch = Batch(**fields | {"loss_weights": floats, "reference": floats})
    for objective in sorted({phase.objective for phase in cfg.phases}):
        step = make_train_step(without_rates(cfg.of_step), model, objective)
        after, metrics = jax.eval_shape(step, state, batch, make_context(cfg, 1, 0))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32


QUICKSTARTS = [path for path in CONFIGS if "quickstart" in path.stem]


@pytest.mark.parametrize("path", QUICKSTARTS, ids=lambda path: path.stem)
def test_a_quickstart_is_one_pipeline(path):
    """Its stages fit together: what each starts from, what is merged, what is measured."""
    config = load_config(path)
    (parent, trained), (ar, _), (conversion, model) = map(
        shipped_model, (config.parent, config.ar, config.conversion)
    )
    assert parent.model and [p.objective for p in parent.phases] == ["ar"]
    assert {p.objective for p in ar.phases} == {"ar"}
    assert "ar" not in {p.objective for p in conversion.phases}
    # Both continue the checkpoint that the parent's training ships.
    assert ar.init.checkpoint == conversion.init.checkpoint == str(TINY_AR)
    assert param_shapes(trained) == param_shapes(model)
    assert ar.data == conversion.data  # one corpus serves both
    *_, report = read_config(config)
    last, row = conversion.phases[-1], conversion.data.row_length
    assert {1, last.block_size, row} <= set(report.block_sizes)
