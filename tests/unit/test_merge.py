"""The mean of the best checkpoints: exact, choosy, and in constant memory."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada2_jax import checkpoint, cli
from llada2_jax.checkpoint import CheckpointError, ModelBundle
from llada2_jax.hub import load_bundle, load_model
from llada2_jax.merge import (
    AVERAGES,
    DECAYS,
    EMA_DECAY,
    average_weights,
    merge_checkpoints,
    select_best,
)
from llada2_jax.model import build
from llada2_jax.types import ModelConfig, SpecialTokens
from tests.helpers import config as tiny
from tests.helpers import exit_status, random_params

CONFIG = tiny(vocab_size=24, num_layers=3)


def bundle(seed: int, config: ModelConfig = CONFIG, **changes) -> ModelBundle:
    made = ModelBundle(
        config=config,
        params=random_params(config, seed),
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
    ("status", "arguments", "message"),
    [
        (1, ["{run}"], "4 checkpoints were asked for"),
        (1, ["{run}/absent"], "no such directory"),
        (1, ["{run}/checkpoints/1", "{run}/checkpoints/1"], "named twice"),
        (2, ["{run}", "--weights", "1,2"], "named one by one"),
        (2, ["{run}/checkpoints/1", "--top-k", "1", "--weights", "1"], "exclude --top-k"),
        (1, ["{run}/checkpoints/1", "--weights", "1,2"], "2 weights were given for 1 checkpoints"),
        (2, ["{run}", "--top-k", "1", "--last", "1"], "not allowed with argument --top-k"),
        (2, ["{run}", "--top-k", "0"], "--top-k: 0: must be at least 1"),
        (1, ["{run}", "--last", "2"], "--last, or name another --kind"),
        (2, ["{run}", "--last", "1", "--mode", "min"], "--mode says what is best, and --last"),
        (2, ["{run}", "--average", "ema", "--ema-decay", "1"], "--ema-decay=1.0 must"),
        (2, ["{run}", "--top-k", "1", "--ema-decay", "0.8"], "--ema-decay belongs to --average=e"),
        (2, ["{run}/checkpoints/1", "--metric", "x"], "--metric chooses among checkpoints"),
        (2, ["{run}/checkpoints/1", "--mode", "min"], "--mode chooses among checkpoints"),
        (2, ["{run}/checkpoints/1", "--kind", "ar"], "--kind chooses among checkpoints"),
        (1, ["{run}/checkpoints/1", "--out", "{run}/checkpoints"], "exists"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path, capsys, status, arguments, message):
    add_step(tmp_path, 1)
    arguments = [argument.format(run=tmp_path) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    assert exit_status("merge", *arguments) == status
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("llada2 merge: error: ") and message in error
    assert not (tmp_path / "out").exists()


# ---- weights -------------------------------------------------------------------------------------


@given(
    average=st.sampled_from(AVERAGES),
    updates=st.lists(st.floats(-1, 1), min_size=0, max_size=8),
)
def test_an_average_is_the_run_with_a_decay(average, updates):
    """Scalars in place of parameters: the oldest checkpoint, and the update up to each next one."""
    count = len(updates) + 1
    checkpoints = np.cumsum([5.0, *updates])
    merged = np.dot(average_weights(average, count), checkpoints)
    if average == "ema":
        wanted = checkpoints[0]
        for value in checkpoints[1:]:
            wanted = EMA_DECAY * wanted + (1 - EMA_DECAY) * value
    else:
        rates = [DECAYS[average](j / count) for j in range(1, count)]
        wanted = 5.0 + np.dot(rates, updates)
    np.testing.assert_allclose(merged, wanted, atol=1e-9)


def test_what_decays_look_like():
    assert average_weights("mean", 4) == [0.25] * 4
    np.testing.assert_allclose(average_weights("one-minus-sqrt", 4), np.diff(np.sqrt(range(5))) / 2)
    weights = average_weights("cosine", 4)
    assert weights[0] == pytest.approx(weights[3]) and weights[1] > weights[0]
    assert average_weights("ema", 3, 0.5) == [0.25, 0.25, 0.5]


def test_a_weighted_mean(tmp_path):
    bundles = [bundle(seed) for seed in range(2)]
    for seed, each in enumerate(bundles):
        checkpoint.save_model(tmp_path / str(seed), each)
    paths = [tmp_path / "0", tmp_path / "1"]
    merge_checkpoints(paths, tmp_path / "out", weights=[3, 1])
    merged = load_model(tmp_path / "out")
    leaves = [checkpoint.flatten(each.params) for each in bundles]
    for path, value in checkpoint.flatten(merged.params).items():
        a, b = (np.asarray(flat[path], np.float64) for flat in leaves)
        np.testing.assert_allclose(np.asarray(value), 0.75 * a + 0.25 * b, rtol=1e-5, atol=1e-6)
    assert [source["weight"] for source in merged.provenance["merged"]] == [0.75, 0.25]
    for i, weights in enumerate(([3e-50, 1e-50], [3e300, 1e300])):  # none is a float32
        merge_checkpoints(paths, tmp_path / f"out{i}", weights=weights)
        again = checkpoint.flatten(load_model(tmp_path / f"out{i}").params)
        for path, value in checkpoint.flatten(merged.params).items():
            np.testing.assert_allclose(again[path], value, rtol=1e-5, atol=1e-6)
    for weights in ([1], [0, 0], [-1, 2], [float("nan"), 1]):
        with pytest.raises(CheckpointError, match="weights"):
            merge_checkpoints(paths, tmp_path / "bad", weights=weights)


def test_weights_by_the_command(tmp_path, capsys):
    for step, value in ((1, 1.0), (2, 9.0), (3, 8.0)):
        add_step(tmp_path, step, value)
    arguments = ["merge", str(tmp_path), "--last", "2", "--average", "one-minus-sqrt"]
    assert cli.main([*arguments, "--out", str(tmp_path / "decayed")]) == 0
    assert "wrote the weighted mean of 2 checkpoints" in capsys.readouterr().out
    sources = load_bundle(tmp_path / "decayed").provenance["merged"]
    assert [source["step"] for source in sources] == [2, 3]  # in time, though 3 is the better one
    weights = [source["weight"] for source in sources]
    np.testing.assert_allclose(weights, [np.sqrt(0.5), 1 - np.sqrt(0.5)])
    steps = [str(tmp_path / "checkpoints" / step) for step in "31"]
    arguments = ["merge", *steps, "--weights", "1,4", "--out", str(tmp_path / "named")]
    assert cli.main(arguments) == 0
    sources = load_bundle(tmp_path / "named").provenance["merged"]
    assert [(x["step"], x["weight"]) for x in sources] == [(3, 0.2), (1, 0.8)]


# ---- memory --------------------------------------------------------------------------------------


def test_memory_grows_neither_with_k_nor_with_the_model_and_each_byte_is_read_once():
    # Chunks so small that what is constant does not hide what grows.
    sizes = ["--megabytes", "16", "48", "--chunk", str(1 << 20), "--cache", str(4 << 20)]
    command = [sys.executable, "-m", "tests.merge_memory", "--k", "2", "6", *sizes]
    root = Path(__file__).parents[2]
    out = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    rows = [json.loads(line) for line in out.splitlines()]
    found = {(row["layout"], row["megabytes"], row["k"]) for row in rows}
    assert found == set(itertools.product(["converted", "trained", "sharded"], [16, 48], [2, 6]))
    assert rows[-1]["peak_mib"] - rows[0]["peak_mib"] < 27, rows  # of 32 MB more, six times
    assert all(row["read_times"] < 1.5 for row in rows), rows
