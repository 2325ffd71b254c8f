"""The benchmark runs both ways and divides the right way round; its times are nobody's promise."""

import runpy
from pathlib import Path

import pytest

from llada2_jax.bench import __main__ as bench
from llada2_jax.bench import overhead as overhead_bench
from llada2_jax.bench.overhead import Overhead, loop_overhead
from llada2_jax.config import ConfigError, TrainConfig, default_config
from llada2_jax.config_check import validate
from tests.tiny_run import small_parent


def test_shares_are_of_the_loop():
    overhead = Overhead(loop=(2.0, 4.0, 1.0), step=(1.5, 3.9, 1.1))
    assert overhead.shares_outside == pytest.approx([-0.1, 0.025, 0.25])
    summary = overhead.summary()
    assert summary["share_outside_model"] == pytest.approx(0.025)
    assert (summary["loop_seconds"], summary["step_seconds"]) == (2.0, 1.5)


@pytest.mark.parametrize("counts", [{"steps": 0, "rounds": 1}, {"steps": 1, "rounds": 0}])
def test_nothing_to_time_is_an_error(counts):
    with pytest.raises(ConfigError, match="both must be at least 1"):
        loop_overhead(TrainConfig(), **counts)


@pytest.mark.parametrize(
    ("status", "argv", "message"),
    [
        (2, [], "'': choose overhead or layers"),
        (2, ["overhead", "--steps", "0"], "--steps: 0: must be at least 1"),
        (2, ["overhead", "--rounds", "-1"], "--rounds: -1: must be at least 1"),
        (
            1,
            ["overhead", "--config", "/nowhere.py"],
            "/nowhere.py is not a config file: name one of configs/",
        ),
    ],
)
def test_mistakes_are_one_line(status, argv, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", *argv])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(bench.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert end.value.code == status and message in error and "Traceback" not in error
    last = error.rstrip().splitlines()[-1]
    assert last.startswith("python -m llada2_jax.bench") and ": error: " in last


def test_both_ways_run(tmp_path, monkeypatch):
    """The same steps of the same config, from the loop's own record and from the bare step."""
    source = tmp_path / "source"
    source.mkdir()
    for i in range(150):
        (source / f"m{i}.py").write_text("def f(x):\n    return x\n" * 8)
    config = default_config()
    config.init.checkpoint = str(small_parent(tmp_path / "parent"))
    config.data.source, config.data.row_length, config.data.rows_per_step = str(source), 16, 2
    config.schedule.stable_tokens = 32  # left out
    config.log_every, config.workdir = 2, "runs/x"
    cfg = validate(config)
    ran = []

    def train(cfg, **kwargs):
        ran.append((cfg.total_steps, [p.objective for p in cfg.phases], Path(cfg.workdir)))
        return run_training(cfg, **kwargs)

    run_training = overhead_bench.train
    monkeypatch.setattr(overhead_bench, "train", train)
    overhead = loop_overhead(cfg, steps=3, rounds=1)
    assert [r[:2] for r in ran] == [(6, ["ar"])]  # 2 to warm up, 3 rounded up to the next log
    assert not any(workdir.exists() for *_, workdir in ran)
    assert len(overhead.loop) == len(overhead.step) == 1
    assert min(*overhead.loop, *overhead.step) > 0
