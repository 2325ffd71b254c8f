"""The mean of the best checkpoints: exact, choosy, and in constant memory."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from llada2_jax import checkpoint, cli
from llada2_jax.checkpoint import CheckpointError, ModelBundle
from llada2_jax.hub import load_bundle, load_model
from llada2_jax.merge import merge_checkpoints, select_best
from llada2_jax.model import build
from llada2_jax.types import ModelConfig, SpecialTokens
from tests.helpers import config as tiny

CONFIG = tiny(vocab_size=24, num_layers=3)


def bundle(seed: int, config: ModelConfig = CONFIG, **changes) -> ModelBundle:
    rng = np.random.default_rng(seed)
    abstract = build(config)[1]
    leaves = {
        path: rng.standard_normal(leaf.shape).astype(leaf.dtype)
        for path, leaf in checkpoint.flatten(abstract).items()
    }
    made = ModelBundle(
        config=config,
        params=checkpoint.fill_params(abstract, leaves),
        special=SpecialTokens(mask=23, eos=22, pad=22),
        tokenizer_files={"tokenizer.json": "{}"},
        provenance={"step": seed},
    )
    return dataclasses.replace(made, **changes)


def train_item(step: int, value: float | None, kind: str) -> dict:
    scores = {"kind": kind} | ({} if value is None else {"bits_per_byte": value})
    return {"step": step, "phase": "decay", "metrics": {"validation": scores}}


def add_step(run, step: int, value: float | None = 1.0, kind: str = "bdlm-32") -> None:
    """A training step's folder, as small as it can be."""
    folder = run / "checkpoints" / str(step)
    checkpoint.save_model(folder, bundle(step))
    (folder / "train").mkdir()
    (folder / "train" / "metadata").write_text(json.dumps(train_item(step, value, kind)))


# ---- averaging -----------------------------------------------------------------------------------


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_the_mean_is_the_mean(tmp_path, param_dtype):
    config = dataclasses.replace(CONFIG, param_dtype=param_dtype)
    bundles = [bundle(seed, config) for seed in range(3)]
    paths = [tmp_path / str(seed) for seed in range(3)]
    for path, each in zip(paths, bundles, strict=True):
        checkpoint.save_model(path, each)
    merge_checkpoints(paths, tmp_path / "out")
    merged = load_model(tmp_path / "out")
    leaves = [checkpoint.flatten(each.params) for each in bundles]
    for path, value in checkpoint.flatten(merged.params).items():
        each = [np.asarray(flat[path], np.float32) for flat in leaves]
        want = ((each[0] + each[1] + each[2]) / np.float32(3)).astype(value.dtype)
        np.testing.assert_array_equal(np.asarray(value), want, err_msg=path)
    assert [source["step"] for source in merged.provenance["merged"]] == [0, 1, 2]
    assert merged.tokenizer_files == {"tokenizer.json": "{}"} and merged.config == config


def test_checkpoints_of_orbax_with_chunks_of_their_own(tmp_path):
    for seed in (0, 1):
        each = bundle(seed)
        tree = checkpoint.nest(checkpoint.flatten(each.params))
        chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=1 << 20), tree)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(
                tmp_path / str(seed),
                ocp.args.Composite(
                    params=ocp.args.PyTreeSave(tree, save_args=chunked),
                    model=ocp.args.JsonSave(each.model_item()),
                    tokenizer=ocp.args.JsonSave(each.tokenizer_item()),
                ),
            )
    merge_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    got = checkpoint.flatten(load_model(tmp_path / "out").params)["embedding"]
    a, b = (checkpoint.flatten(bundle(seed).params)["embedding"] for seed in (0, 1))
    np.testing.assert_array_equal(got, (a + b) / jnp.float32(2))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (bundle(1, dataclasses.replace(CONFIG, rope_theta=1e4)), "their config differ"),
        (bundle(1, tokenizer_files={}), "their tokenizer_files differ"),
        (bundle(1, special=SpecialTokens(mask=21, eos=22, pad=22)), "their special differ"),
        (
            bundle(1, dataclasses.replace(CONFIG, param_dtype="bfloat16")),
            r"parameter dense_layers/.* is float32\[.*bfloat16\[",
        ),
    ],
)
def test_different_models_do_not_mix(tmp_path, other, message):
    checkpoint.save_model(tmp_path / "a", bundle(0))
    checkpoint.save_model(tmp_path / "b", other)
    with pytest.raises(CheckpointError, match=message):
        merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite(tmp_path):
    broken = bundle(1)
    leaves = checkpoint.flatten(broken.params)
    leaves["head"] = leaves["head"].at[0, 0].set(jnp.nan)
    params = checkpoint.fill_params(build(CONFIG)[1], leaves)
    checkpoint.save_model(tmp_path / "a", bundle(0))
    checkpoint.save_model(tmp_path / "b", dataclasses.replace(broken, params=params))
    with pytest.raises(CheckpointError, match="parameter head has weights that are not finite"):
        merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


# ---- choosing ------------------------------------------------------------------------------------


def test_only_one_kind_of_loss_compares(tmp_path):
    add_step(tmp_path, 1, 0.5, "mdlm")
    add_step(tmp_path, 2, 3.0)
    add_step(tmp_path, 3, float("nan"))
    add_step(tmp_path, 4, None)
    add_step(tmp_path, 5, 1.0)
    add_step(tmp_path, 6, 2.0)
    selection = select_best(tmp_path, 2)
    assert [c.step for c in selection.chosen] == [5, 6] and selection.kind == "bdlm-32"
    reasons = {path.name: reason for path, reason in selection.excluded.items()}
    assert reasons == {
        "1": "its kind is mdlm, not bdlm-32",
        "3": "its validation.bits_per_byte is nan",
        "4": "it has no validation.bits_per_byte",
    }
    assert [c.step for c in select_best(tmp_path, 2, mode="max").chosen] == [2, 6]
    assert [c.step for c in select_best(tmp_path, 1, kind="mdlm").chosen] == [1]
    with pytest.raises(CheckpointError, match=r"4 checkpoints were asked for, but 3 .*--top-k"):
        select_best(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"has a finite validation\.odd"):
        select_best(tmp_path, 1, "validation.odd")


def test_the_command(tmp_path, capsys):
    for step, value in ((1, 3.0), (2, 1.0), (3, 2.0)):
        add_step(tmp_path, step, value)
    out = tmp_path / "merged"
    assert cli.main(["merge", str(tmp_path), "--top-k", "2", "--out", str(out)]) == 0
    assert "wrote the mean of 2 checkpoints" in capsys.readouterr().out
    provenance = load_bundle(out).provenance
    assert provenance["selection"]["steps"] == [
        {"step": 2, "value": 1.0},
        {"step": 3, "value": 2.0},
    ]
    steps = [str(tmp_path / "checkpoints" / step) for step in "12"]
    assert cli.main(["merge", *steps, "--out", str(tmp_path / "two")]) == 0
    assert len(load_bundle(tmp_path / "two").provenance["merged"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}"], "4 checkpoints were asked for"),
        (["{run}/absent"], "no such directory"),
        (["{run}/checkpoints/1", "{run}/checkpoints/1"], "named twice"),
        (["{run}/checkpoints/1", "--out", "{run}/checkpoints"], "exists"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, arguments, message):
    add_step(tmp_path, 1)
    arguments = [argument.format(run=tmp_path) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    assert cli.main(["merge", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("llada2 merge: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- memory --------------------------------------------------------------------------------------

_MEASURE = """
import resource, sys
from pathlib import Path
from llada2_jax import checkpoint, merge
# Small enough that what is constant does not hide what grows.
checkpoint.CACHE_BYTES, checkpoint.CHUNK_BYTES = 4 << 20, 1 << 20
small, out, *paths = map(Path, sys.argv[1:])
merge.merge_checkpoints([small] * 2, out.with_name("warm"))
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge.merge_checkpoints(paths, out)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) << 10)
"""


def test_memory_grows_neither_with_k_nor_with_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 1 << 20)
    large = dataclasses.replace(CONFIG, vocab_size=160_000, hidden_size=64, num_experts=64)
    checkpoint.save_model(tmp_path / "small", bundle(0))
    checkpoint.save_model(tmp_path / "0", bundle(0, large))
    size = sum(spec.nbytes for spec in checkpoint.ParamReader(tmp_path / "0/params").specs.values())
    assert size > 75 << 20
    for copy in ("1", "2"):
        shutil.copytree(tmp_path / "0", tmp_path / copy)
    paths = [tmp_path / name for name in ("small", "out", "0", "1", "2")]
    out = subprocess.run(
        [sys.executable, "-c", _MEASURE, *map(str, paths)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(out.stdout) < size / 3, f"{int(out.stdout) >> 20} MiB for {size >> 20} MiB a model"
