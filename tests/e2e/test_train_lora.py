"""Runs that train adapters: their checkpoints, going on, and the merged model."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from llada2_jax.checkpoint import CheckpointError, ModelBundle, ParamReader, read_bundle, save_model
from llada2_jax.config import default_config
from llada2_jax.config_check import validate
from llada2_jax.hub import load_model
from llada2_jax.hub.streaming import Options, convert
from llada2_jax.merge import merge_checkpoints
from llada2_jax.metrics import read_metrics
from llada2_jax.train import train
from llada2_jax.types import ADAPTED_MODULES
from tests.data_helpers import SPECIAL, files
from tests.helpers import assert_same_params, random_params
from tests.helpers import config as tiny
from tests.tiny_run import write_corpus

MODEL = tiny(vocab_size=300, param_dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    write_corpus(folder)
    bundle = ModelBundle(MODEL, random_params(MODEL, 0, 0.1), SPECIAL, files())
    save_model(folder / "start", bundle)
    return folder


def run(folder: Path, workdir: str):
    config = default_config()
    config.workdir = str(folder / workdir)
    config.init.checkpoint = str(folder / "start")
    config.data.source = str(folder / "corpus")
    config.data.row_length = 32
    config.data.rows_per_step = 2
    config.schedule.decay_blocks = (4,)
    config.schedule.decay_tokens = 4 * 64
    config.optimizer.learning_rate = 0.05
    config.lora.rank = 2
    config.lora.modules = ADAPTED_MODULES
    config.eval.rows = 2
    config.eval.rate_buckets = 0
    config.checkpoint.every_tokens = 2 * 64
    config.runtime.dtype = "float32"
    config.log_every = 1
    return train(validate(config))


@pytest.fixture(scope="module")
def finished(folder) -> ModelBundle:
    return run(folder, "run")


def test_checkpoints_hold_the_adapters_alone(folder, finished):
    step = folder / "run/checkpoints/4"
    specs = ParamReader(step / "params").specs
    assert specs and all("_adapter/" in path for path in specs)
    assert read_bundle(step).base["path"] == str(folder / "start")
    start = load_model(folder / "start")
    assert jax.tree.structure(finished.params) == jax.tree.structure(start.params)
    loaded = load_model(step, dtype="float32")
    assert loaded.config == finished.config and loaded.config.lora is None
    for a, b in zip(*map(jax.tree.leaves, (loaded.params, finished.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_run_goes_on_with_its_adapters(folder, finished):
    shutil.copytree(folder / "run", folder / "again")
    shutil.rmtree(folder / "again/checkpoints/4")
    assert_same_params(run(folder, "again").params, finished.params)
    losses = [[m["loss"] for m in read_metrics(folder / r, "train")] for r in ("run", "again")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_steps_average_as_merged_models(folder, finished):
    """Averaging the factors would be something else."""
    steps = [folder / f"run/checkpoints/{step}" for step in (2, 4)]
    merge_checkpoints(steps, folder / "average")
    got = load_model(folder / "average")
    assert got.config.lora is None
    whole = [load_model(step).params for step in steps]
    want = jax.tree.map(lambda a, b: (a + b) / 2, *whole)
    for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_export_is_the_merged_model(folder, finished):
    convert(folder / "run/checkpoints/4", folder / "exported", Options(to="orbax"))
    got = load_model(folder / "exported")
    for a, b in zip(*map(jax.tree.leaves, (got.params, finished.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_adapters_are_refused_on_another_base(folder, finished):
    shutil.copytree(folder / "run/checkpoints/4", folder / "step")
    bundle = load_model(folder / "start")
    other = dataclasses.replace(bundle, params=random_params(MODEL, 1, 0.1))
    save_model(folder / "other", other)
    (folder / "start").rename(folder / "kept")
    (folder / "other").rename(folder / "start")
    for read in (load_model, lambda path: convert(path, folder / "no", Options(to="orbax"))):
        with pytest.raises(CheckpointError, match="start, whose parameters have changed since"):
            read(folder / "step")
    (folder / "start").rename(folder / "other")
    (folder / "kept").rename(folder / "start")
