"""A run folder explains itself, and runs are set side by side."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llada2_jax import cli
from llada2_jax.config import ConfigError, DataConfig, InitConfig, TrainConfig
from llada2_jax.run_folder import (
    environment,
    read_config,
    read_starts,
    record_config,
    record_start,
)
from llada2_jax.runs import as_text, compare, plot

CFG = TrainConfig(workdir="w", data=DataConfig(row_length=32))


def line(step: int, **values) -> dict:
    return {"step": step, "tokens": 10 * step, "kind": "train", "phase": "ar", **values}


def make_run(folder, cfg, losses, data=None, validation=()):
    """A run folder as training leaves it."""
    record_config(folder, cfg)
    record_start(folder, step=0, params={"w": np.zeros(2)}, data={"source": {"documents": 3}})
    lines = [
        line(i, loss=loss, data_checksum=(data or range(99))[i], skipped=0, tokens_per_second=i)
        for i, loss in enumerate(losses, 1)
    ]
    measured = {"kind": "validation", "measured": "bdlm-4"}
    lines += [line(i, **measured, bits_per_byte=bits) for i, bits in validation]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


@pytest.fixture
def two(tmp_path):
    make_run(tmp_path / "a", CFG, [3.0, 2.0, 1.0], validation=[(2, 0.9), (3, 0.8)])
    other = dataclasses.replace(CFG, seed=7)
    make_run(tmp_path / "b", other, [3.0, 2.5, 2.0], [0, 1, 2, 99], validation=[(2, 1.2)])
    return [tmp_path / "a", tmp_path / "b"]


def test_what_differs_and_what_came_of_it(two):
    sections = compare(two)
    assert sections["config"] == {"seed": [0, 7]} and sections["environment"] == {}
    result = sections["result"]
    assert result["training loss, last tenth"] == [1.0, 2.0]
    assert result["best bits/byte, bdlm-4"] == [0.8, 1.2]
    assert result["tokens/s, median"] == [2.0, 2.0] and result["steps"] == [3, 3]
    assert result["same losses up to step"] == [3, 1] and result["same data up to step"] == [3, 2]


def test_equal_runs_agree_to_the_end_whatever_they_logged(tmp_path):
    for name in "ab":
        make_run(tmp_path / name, CFG, [3.0, float("nan"), 1.0], validation=[(2, 0.5)])
    result = compare([tmp_path / "a", tmp_path / "b"])["result"]
    assert result["same losses up to step"] == [3, 3]


def test_the_best_of_a_run_is_a_number(tmp_path):
    make_run(tmp_path / "a", CFG, [3.0], validation=[(1, float("nan")), (2, 0.5), (3, 0.6)])
    assert compare([tmp_path / "a"])["result"]["best bits/byte, bdlm-4"] == [0.5]


def test_preferences_are_compared_by_their_loss(tmp_path):
    make_run(tmp_path / "a", CFG, [3.0])
    scores = [{"loss": loss, "reward_margin": 0.1, "measured": "dpo:dpo-32"} for loss in (0.6, 0.5)]
    lines = [line(i, **score, kind="validation") for i, score in enumerate(scores, 1)]
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(x) + "\n" for x in lines)
    result = compare([tmp_path / "a"])["result"]
    assert result["best loss, dpo:dpo-32"] == result["last loss, dpo:dpo-32"] == [0.5]


VALUES = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=3)
NAMES = st.sampled_from(["step", "tokens", "kind", "phase", "loss", "bits_per_byte", "measured"])


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font:UserWarning")  # of odd names
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    with_plot=st.integers(0, 9).map(lambda i: not i),
    lines=st.lists(st.dictionaries(NAMES, VALUES | st.sampled_from(["train", "validation"]))),
)
def test_what_stands_in_the_metrics_is_no_traceback(tmp_path, with_plot, lines):
    folder = tmp_path / "run"
    if not folder.exists():
        make_run(folder, CFG, [3.0])
    whole = [line(1) | x for x in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in whole))
    as_text(compare([folder, folder]), ["a", "b"])
    if with_plot:  # which takes long
        plot([folder], ["a"], tmp_path / "plot.png")


def test_the_command(two, tmp_path, capsys):
    plot = tmp_path / "p.png"
    assert cli.main(["runs", "compare", *map(str, two), "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "| seed | 0 | 7 |" in out and "no difference" in out and str(plot) in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["runs", "compare", str(two[0]), str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err
    assert "none is not a run: it has no config.json" in error and error.count("\n") == 1


def test_a_run_without_lines_yet(two, tmp_path):
    record_config(tmp_path / "new", CFG)
    result = compare([two[0], tmp_path / "new"])["result"]
    assert result["steps"] == [3, 0] and result["best bits/byte, bdlm-4"] == [0.8, None]


def test_a_start_tells_of_versions_devices_and_mesh(tmp_path):
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("fsdp", "model"))
    params = {"w": jax.device_put(np.zeros(2), NamedSharding(mesh, PartitionSpec("fsdp")))}
    record_start(tmp_path, step=4, params=params, data=None)
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"step": 5, "torn')
    record_start(tmp_path, step=6, params=params, data=None)  # is not swallowed by the torn line
    start, later = read_starts(tmp_path)
    assert later["step"] == 6 and "\n\n" not in (tmp_path / "starts.jsonl").read_text()
    assert start["step"] == 4 and start["mesh"] == {"fsdp": 1, "model": 1}
    assert start["packages"]["jax"] == jax.__version__ and "cpu" in start["device"].lower()
    assert start["devices"] == jax.device_count() and start["cores"] > 0
    git = environment()["git"]
    assert git is None or len(git["revision"]) == 40


def test_a_config_that_is_not_readable_is_named(tmp_path):
    record_config(tmp_path, CFG)
    record_config(tmp_path, dataclasses.replace(CFG, log_every=99))  # changes nothing computed
    with pytest.raises(ConfigError, match=r"another config\.data\.row_length: 32 there, 64 now"):
        record_config(tmp_path, dataclasses.replace(CFG, data=DataConfig(row_length=64)))
    for text in ("{", "[]", '"\ud800'):
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(ConfigError, match=r"config\.json .*: remove it"):
            read_config(tmp_path)


def test_a_field_that_the_run_s_version_lacked_was_at_its_default(tmp_path):
    record_config(tmp_path, CFG)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    del stored["data"]["block_anchor"], stored["spikes"]
    path.write_text(json.dumps(stored))
    record_config(tmp_path, CFG)
    path.write_text(json.dumps(stored))
    other = dataclasses.replace(CFG, data=dataclasses.replace(CFG.data, block_anchor="row"))
    with pytest.raises(ConfigError, match=r"another config\.data"):
        record_config(tmp_path, other)


def test_a_run_goes_on_from_the_model_it_began_with(tmp_path):
    """Whatever else stands at that path by now."""
    cfg = dataclasses.replace(CFG, init=InitConfig(checkpoint="parent"))
    parts = {"tokenizer": 1, "architecture": 2, "parameters": 3}
    record_config(tmp_path, cfg)  # as versions did that took no checksums
    for _ in range(2):
        record_config(tmp_path, cfg, parent=parts)
    for part in parts:
        with pytest.raises(ConfigError, match=rf"init\.checkpoint now is: its {part} changed"):
            record_config(tmp_path, cfg, parent=parts | {part: 9})
    assert read_config(tmp_path)["parent"] == parts


@pytest.mark.parametrize("now", [{"books (train)": "b"}, {"other (train)": "a"}])
def test_a_run_goes_on_with_the_data_it_began_with(tmp_path, now):
    record_config(tmp_path, CFG, corpus={"books (train)": "a"})
    with pytest.raises(ConfigError, match=r"another corpus than config\.data now is: its \w+ \(tr"):
        record_config(tmp_path, CFG, corpus=now)
    record_config(tmp_path, CFG, corpus={"books (train)": "a"})
