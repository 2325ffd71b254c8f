"""Preference optimisation as a run: its reference, its cache, its validation, its errors."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from llada2_jax import reference, train
from llada2_jax.checkpoint import ModelBundle, save_model
from llada2_jax.config import ConfigError, default_config
from llada2_jax.config_check import validate
from llada2_jax.data.prepare import prepare
from llada2_jax.data.prepared import read_manifest
from llada2_jax.errors import UserError
from llada2_jax.hub import load_bundle, load_model
from llada2_jax.merge import merge_checkpoints
from llada2_jax.metrics import read_metrics
from llada2_jax.run_folder import read_starts
from llada2_jax.starting_model import with_learning_rate
from tests.data_helpers import SPECIAL, files, job, write_jsonl
from tests.helpers import assert_same_params, one_layer, random_params

MODEL = one_layer(vocab_size=300, param_dtype="float32")
STEPS, ROW, RATE = 6, 128, 0.02


def pair(number: int, length: int = 3) -> dict:
    words = ["alpha", "beta", "gamma", "delta"]
    answers = (" ".join(words[(number + i) % 4] for i in range(length - j)) for j in range(2))
    chosen, rejected = answers
    return {"prompt": f"{number}?", "chosen": chosen, "rejected": rejected}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, another one, some that do not go with it, and prepared pairs."""
    folder = tmp_path_factory.mktemp("dpo")
    bundle = ModelBundle(MODEL, random_params(MODEL, 0, 0.1), SPECIAL, files())
    save_model(folder / "start", bundle)
    other = dataclasses.replace(bundle, params=random_params(MODEL, 1, 0.1))
    save_model(folder / "other", other)
    foreign = dataclasses.replace(SPECIAL, pad=3)
    save_model(folder / "foreign", dataclasses.replace(bundle, special=foreign))
    renamed = files() | {
        "tokenizer.json": files()["tokenizer.json"].replace("role_end", "role_End")
    }
    save_model(folder / "renamed", dataclasses.replace(bundle, tokenizer_files=renamed))
    save_model(folder / "mute", dataclasses.replace(bundle, tokenizer_files={}))
    wide = one_layer(vocab_size=301, param_dtype="float32")
    wide = dataclasses.replace(bundle, config=wide, params=random_params(wide, 0))
    save_model(folder / "wide", wide)
    for name, rows in (("pairs", map(pair, range(40))), ("long", [pair(i, 40) for i in range(40)])):
        source = write_jsonl(folder / f"{name}.jsonl", list(rows))
        prepare(job(source, content="preference", template="llada2"), folder / name, processes=1)
    return folder


def make(folder: Path, workdir: str, **fields):
    config = default_config()
    config.workdir = str(folder / workdir)
    config.init.checkpoint = str(folder / "start")
    config.data.sources = (str(folder / "pairs"),)
    config.data.packing = "best_fit"
    config.data.pad_multiple = 4
    config.data.row_length = ROW
    config.data.rows_per_step = 4
    config.schedule.dpo_tokens = STEPS * 4 * ROW
    config.schedule.posttrain_block = 4
    config.dpo.samples = 2
    config.dpo.antithetic = True
    config.optimizer.learning_rate = RATE
    config.optimizer.accumulate = 2
    config.eval.rows = 2
    config.eval.samples = 2
    config.checkpoint.every_tokens = 3 * 4 * ROW
    config.runtime.dtype = "float32"
    config.log_every = 1
    for name, value in fields.items():
        *groups, field = name.split("__")
        part = config
        for group in groups:
            part = part[group]
        part[field] = value
    return validate(config)


def losses(workdir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(workdir, "train")]


@pytest.fixture(scope="module")
def finished(folder):
    """A run that takes its reference from the host, and the reference as it was at the end."""
    kept = []

    def place(params, memory):
        kept.append(reference.place(params, memory))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "place", place)
        train.train(make(folder, "run", reference__memory="host"))
    return kept[-1]


def test_a_run_learns_its_pairs(folder, finished):
    trained = read_metrics(folder / "run", "train")
    assert trained[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert trained[-1]["reward_margin"] > trained[0]["reward_margin"] + 0.01
    held_out = read_metrics(folder / "run", "validation")
    assert [line["step"] for line in held_out] == [3, 6]
    for line in held_out:
        assert line["pairs"] >= 2 and 0 <= line["reward_accuracy"] <= 1
        assert math.isfinite(line["loss"]) and line["block_size"] == 4


def test_a_start_says_how_its_data_was_made(folder, finished):
    (source,) = read_starts(folder / "run")[0]["data"].values()
    made = read_manifest(folder / "pairs")
    assert source["manifest"]["tokenizer"] == made["tokenizer"]
    assert source["manifest"]["rows"] == made["rows"] and "shards" not in source["manifest"]


def test_the_reference_is_frozen(folder, finished):
    start = load_model(folder / "start", dtype="float32").params
    assert_same_params(finished, start)
    leaf = finished["embedding"][...]
    assert leaf.sharding.memory_kind == "pinned_host"
    trained = load_model(folder / "run/checkpoints/6").params["embedding"][...]
    assert (np.asarray(leaf) != np.asarray(trained)).any()


def test_a_run_goes_on_where_it_was(folder, finished):
    """And with the reference it began with, though the policy moved."""
    shutil.copytree(folder / "run", folder / "again")
    shutil.rmtree(folder / "again/checkpoints/6")
    cfg = make(folder, "again", reference__memory="host")
    train.train(cfg)
    assert losses(folder / "again") == losses(folder / "run")
    ends = [load_model(folder / run / "checkpoints/6").params for run in ("run", "again")]
    assert_same_params(*ends)


def test_another_model_is_the_reference_to_the_end(folder, finished):
    """At first the rewards of two models against each other are opposites."""
    shutil.copytree(folder / "start", folder / "reference")

    def run(start: str, other: str) -> list[float]:
        fields = {"init__checkpoint": folder / start, "reference__checkpoint": folder / other}
        fields = {name: str(path) for name, path in fields.items()} | {"reference__memory": "host"}
        cfg = make(folder, f"from {start}", **fields)
        train.train(cfg)
        return [line["reward_chosen"] for line in read_metrics(Path(cfg.workdir), "train")]

    there, back = run("start", "other"), run("other", "reference")
    assert len(there) == len(back) == STEPS
    assert there[0] == pytest.approx(-back[0], rel=1e-3) and abs(there[0]) > 1e-3

    shutil.rmtree(folder / "reference")
    shutil.copytree(folder / "other", folder / "reference")
    with pytest.raises(ConfigError, match="another model than config.reference.checkpoint now is"):
        run("other", "reference")


def test_cached_bounds_serve_as_well(folder, finished):
    cache = folder / "bounds.npz"
    train.train(make(folder, "cached", reference__cache=str(cache)))
    np.testing.assert_allclose(losses(folder / "cached"), losses(folder / "run"), rtol=2e-4)
    before = cache.read_bytes()
    for fields, what in (
        ({"seed": 1}, r"config\.seed"),
        ({"dpo__samples": 4}, r"config\.dpo"),
        ({"reference__checkpoint": str(folder / "other")}, "reference"),
    ):
        with pytest.raises(ConfigError, match=f"is stale: it was made with another {what} "):
            train.train(make(folder, "stale", reference__cache=str(cache), **fields))
        shutil.rmtree(folder / "stale")
    assert cache.read_bytes() == before
    cache.write_bytes(before[:100])
    with pytest.raises(ConfigError, match="holds no bounds of a reference .*: remove it"):
        train.train(make(folder, "stale", reference__cache=str(cache)))


def test_the_model_under_adapters_is_the_reference(folder):
    final = train.train(make(folder, "lora", lora__rank=2))
    trained = read_metrics(folder / "lora", "train")
    assert trained[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert abs(trained[-1]["reward_margin"]) > 1e-3  # the reference does not move with the policy
    start = load_model(folder / "start", dtype="float32").params
    assert_same_params(final.params["moe_layers"]["mlp"], start["moe_layers"]["mlp"])
    qkv = (params["moe_layers"]["attention"]["qkv"][...] for params in (final.params, start))
    assert (next(qkv) != next(qkv)).any()


def test_the_learning_rate_goes_on(folder, finished):
    """From a step of a run; the stable one is reached after the warmup. From an average, that of
    its last step."""
    fields = {
        "init__checkpoint": str(folder / "run/checkpoints/3"),
        "optimizer__learning_rate_from_start": True,
        "optimizer__learning_rate": 1e-3,  # the default
        "optimizer__warmup_fraction": 0.0,
    }
    cfg = with_learning_rate(make(folder, "next", **fields))
    rate = load_bundle(folder / "run/checkpoints/3").provenance["learning_rate"]
    assert cfg.optimizer.learning_rate == rate == pytest.approx(RATE)
    bundle = load_model(folder / "start")
    for step, rate in ((9, 0.1), (10, 0.01), (8, 0.2)):
        provenance = {"step": step, "learning_rate": rate}
        save_model(folder / f"step {step}", dataclasses.replace(bundle, provenance=provenance))
    merge_checkpoints([folder / f"step {step}" for step in (9, 10, 8)], folder / "average")
    average = {"init__checkpoint": str(folder / "average")}
    cfg = with_learning_rate(make(folder, "next", **fields | average))
    assert cfg.optimizer.learning_rate == 0.01
    with pytest.raises(ConfigError, match="does not tell the learning rate .*: set learning_rate"):
        start = {"init__checkpoint": str(folder / "start")}
        with_learning_rate(make(folder, "next", **fields | start))


WRONG = {
    "vocabulary": (
        {"reference__checkpoint": "wide"},
        r"config\.reference\.checkpoint=.*wide' has another vocabulary than .* 301, not 300",
    ),
    "special tokens": (
        {"reference__checkpoint": "foreign"},
        r"foreign' has another vocabulary than .* its special tokens: .*pad=3.*, not .*pad=1",
    ),
    "tokenizer of equal size": (
        {"reference__checkpoint": "renamed"},
        r"renamed' has another vocabulary than .* its tokenizer's sha256: ",
    ),
    "reference without a tokenizer": (
        {"reference__checkpoint": "mute"},
        r"config\.reference\.checkpoint=.*mute' has no tokenizer\.json: put one beside",
    ),
    "start without a tokenizer": (
        {"init__checkpoint": "mute"},
        r"init\.checkpoint=.*mute' has no tokenizer\.json: put one beside",
    ),
    "longer than a row": (
        {"data__sources": ("long",)},
        r"pairs are longer than a row: data\.row_length=128, the longest takes",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_come_before_any_step(folder, name):
    fields, message = WRONG[name]
    placed = {
        key: str(folder / value)
        if isinstance(value, str)
        else tuple(str(folder / v) for v in value)
        for key, value in fields.items()
    }
    with pytest.raises(UserError, match=message):
        train.train(make(folder, f"wrong {name}", **placed))
    assert not list(folder.glob(f"wrong {name}/checkpoints/*"))


def test_equal_answers_are_bad_rows(folder):
    """Also where only their tokens are equal."""
    rows = [pair(i) for i in range(9)] + [{"prompt": "p", "chosen": "alpha", "rejected": "alpha"}]
    source = write_jsonl(folder / "equal.jsonl", rows)
    made = job(source, max_bad=0.5, content="preference", template="llada2")
    manifest = prepare(made, folder / "equal", processes=1)
    assert manifest["rows"]["bad"] == {"same_answers": 1}
    assert json.loads((folder / "equal/manifest.json").read_text())["rows"]["read"] == 10
