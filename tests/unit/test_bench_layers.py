"""`bench layers`: its arithmetic, its processes, and that both sides train the same layers."""

import dataclasses
import json
import os
import re

import jax
import numpy as np
import pytest

from llada2_jax.adapters import split_trained
from llada2_jax.bench import jax_layers
from llada2_jax.bench.layers import (
    MODELS,
    ContenderError,
    Contenders,
    Job,
    _fitting,
    differences,
    figures,
    main,
    measure,
)
from llada2_jax.checkpoint import flatten
from llada2_jax.errors import UsageError
from llada2_jax.hardware import CHIPS
from llada2_jax.model import build
from llada2_jax.optimizer import make_optimizer
from pallas_kernels.peaks import peak_flops
from tests.helpers import config

SMALL = config(
    vocab_size=1,
    num_layers=3,
    initializer_range=0.02,
    remat="full",
    tie_word_embeddings=True,
    dtype="bfloat16",
)
JOB = Job("cpu", SMALL, rows=2, length=8, block_size=4, steps=3, seed=0)


@pytest.fixture
def without_torch(tmp_path):
    """An interpreter that has no torch."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ModuleNotFoundError: no torch\n\nnote' >&2\nexit 1\n")
    python.chmod(0o755)
    return str(python)


def test_the_steps_train():
    answer = jax_layers.timed(JOB.of("jax, tiled experts").asked("time"))
    first, last = answer["losses"]
    assert 1 < first < 3 and last < first  # both sides have unit variance
    assert answer["seconds"] > 0 and answer["peak_bytes"] is None  # a CPU does not say


def test_all_layers_have_weights_of_their_own():
    params = flatten(jax_layers.initial_params(JOB.of("jax").asked("time")))
    wanted = flatten(build(SMALL)[1])
    assert {k: (v.shape, v.dtype) for k, v in params.items()} == {
        k: (v.shape, v.dtype) for k, v in wanted.items()
    }
    down = np.asarray(params["moe_layers/mlp/experts/down"])
    assert down.shape[0] == 2 and down[1].std() == pytest.approx(0.02, rel=0.2)


def test_figures_of_one_dense_layer():
    job = dataclasses.replace(JOB, model=dataclasses.replace(SMALL, num_layers=1))
    weights = 16 * 8 * (2 * 2 + 2 * 1) + 3 * 16 * 16  # of attention and feed-forward
    pairs = 2 * (4 * 4 + 4 * 8)  # of both halves of a row: the own block, and one earlier
    flops = 3 * 2 * 2 * (2 * 8 * weights + 2 * 2 * 8 * pairs)  # 3 passes, 2 rows
    answer = {"seconds": 0.5, "losses": [2.0, 1.5], "peak_bytes": 2**29}
    found = figures(job, answer, peak=flops * 8)
    assert found == {
        "ms a step": 500.0,
        "tokens/s": 32,
        "TFLOP/s": pytest.approx(flops / 0.5 / 1e12),
        "MFU %": pytest.approx(25.0),
        "peak GiB": 0.5,
        "first loss": 2.0,
        "last loss": 1.5,
    }
    unknown = figures(job, answer | {"peak_bytes": None}, peak=None)
    assert set(found) - set(unknown) == {"MFU %", "peak GiB"}


def test_the_largest_stack_fills_the_memory():
    asked = JOB.of("jax").asked("size")
    needed = [jax_layers.needed_bytes(asked, layers) for layers in (1, 2, 3)]
    assert [jax_layers.largest_stack(asked, limit) for limit in needed] == [1, 2, 3]
    assert jax_layers.largest_stack(asked, needed[1] - 1) == 1
    assert jax_layers.largest_stack(asked, needed[0] - 1) == 0
    assert jax_layers.largest_stack(asked, 10 * needed[2]) == 3  # no more than the model has
    layer = SMALL.num_experts * 3 * 16 * 8  # parameters of the routed experts alone
    assert needed[2] - needed[1] > 12 * layer  # bf16 with gradient, two fp32 moments


def test_a_contender_that_fails_has_its_reason_in_the_table(without_torch, capsys):
    def errors(contenders):
        return [record["error"] for record in measure(JOB, "cpu", ["torch"], contenders)]

    assert errors(Contenders(without_torch, 60)) == ["ModuleNotFoundError: no torch"]
    assert "note" in capsys.readouterr().err  # the rest of it is to be seen as well
    assert errors(Contenders(without_torch, 0)) == ["not done after 0 s (--seconds)"]
    assert "No such file" in errors(Contenders("/no/python", 60))[0]


def test_the_command_on_a_cpu(without_torch, capsys):
    options = ["--model", "toy", "--only", "torch", "--torch-python", without_torch, "--json"]
    assert main(options) == 1  # all failed
    (record,) = json.loads(capsys.readouterr().out)
    assert record == {"contender": "torch", "error": "ModuleNotFoundError: no torch"}


def test_what_fits_is_not_guessed():
    assert _fitting(3, "full") == 3
    for layers, remat in [(0, "full"), (None, "full"), (3, "none")]:
        with pytest.raises(UsageError, match="layer"):
            _fitting(layers, remat)
    with pytest.raises(UsageError, match="leave out --only"):
        main(["--check", "--only", "torch"])


@pytest.mark.parametrize("attention", ["xla", "mosaic"])
def test_a_step_of_minis_layers_lowers_for_a_gpu(attention):
    """As far as a GPU's program can be seen without one."""
    model = dataclasses.replace(MODELS["mini"], num_layers=2, vocab_size=1, remat="full")
    model = dataclasses.replace(model, attention_backend=attention, experts_backend="ragged_dot")
    asked = Job("gpu", model, rows=1, length=4096, block_size=32, steps=1, seed=0).asked("time")
    trained, buffers = split_trained(build(model)[1])
    moments = jax.eval_shape(make_optimizer(jax_layers.train_config(asked).of_step).init, trained)
    x = jax.ShapeDtypeStruct((1, 8192, 2048), "bfloat16")
    target = jax.ShapeDtypeStruct((1, 4096, 2048), "float32")
    state = trained, moments, jax.ShapeDtypeStruct((), "int32")
    traced = jax_layers.make_step(asked).trace(state, buffers, x, target)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "ragged_dot" in program
    assert ("mosaic_gpu" in program) == (attention == "mosaic")


def test_a_check_that_cannot_be_made_fails(capsys, monkeypatch):
    def run(self, name, asked):
        if name == "torch":
            raise ContenderError("no torch")
        return {"platform": "gpu", "kind": "abacus", "layers": 1}

    monkeypatch.setattr(Contenders, "run", run)
    assert main(["--check", "--json"]) == 1
    records = json.loads(capsys.readouterr().out)
    assert [(r["on"], r["dtype"], r["same"], r["error"]) for r in records] == [
        ("cpu", "float32", "NO", "no torch"),
        ("gpu", "bfloat16", "NO", "no torch"),
    ]


def test_a_difference_is_one_beyond_the_tolerance():
    ours = {"a": np.array([3.0, 4.0]), "b": np.array([1.0]), "c": np.array([1.0])}
    theirs = {"a": np.array([3.0, 4.4]), "b": np.array([1.2]), "c": np.array([np.nan])}
    found = differences(ours, theirs, 0.1)
    assert [(r["differs by"], r["same"]) for r in found] == [
        ("8.0e-02", "yes"),
        ("2.0e-01", "NO"),
        ("nan", "NO"),
    ]
    with pytest.raises(ContenderError, match="only one side has 'b'"):
        differences(ours, {"a": ours["a"], "c": ours["c"]}, 0.1)


@pytest.mark.parametrize(
    ("kind", "chip", "devices"),
    [("TPU v5 lite", "v5e", 1), ("TPU v5p", "v5p", 1), ("TPU7x", "tpu7x", 2)]
    + [("NVIDIA H200", "h200-141gb", 1), ("NVIDIA A100-SXM4-80GB", "a100-80gb", 1)],
)
def test_a_device_has_the_peak_of_its_chip(kind, chip, devices):
    assert peak_flops(kind) == CHIPS[chip].flops / devices


def test_an_unknown_device_has_no_peak():
    assert peak_flops("abacus") is None


def test_torch_trains_the_same_layers(capsys):
    python = os.environ.get("LLADA2_TORCH_PYTHON")
    if not python:
        pytest.skip("LLADA2_TORCH_PYTHON names no interpreter with PyTorch")
    status = main(["--check", "--torch-python", python, "--json"])
    records = json.loads(capsys.readouterr().out)
    assert status == 0, [record for record in records if record["same"] != "yes"]
    assert re.search("losses.*output", " ".join(record["array"] for record in records))
