"""Post-training's own parts; tests/e2e/test_posttrain.py runs the whole."""

import json
import time
from pathlib import Path

import ml_collections
import pytest

from llada2_jax import posttrain, posttrain_report
from llada2_jax.config import ConfigError, load_config
from llada2_jax.posttrain import Setting
from llada2_jax.posttrain_report import (
    Point,
    arm_points,
    arm_seconds,
    family_scores,
    gain,
    preference,
    took,
)

CONFIGS = Path(__file__).parents[2] / "configs"


def arms_config(comparisons=None, **arms):
    fields = {
        name: {"stage": s, "start": start, "changes": {}} for name, (s, start) in arms.items()
    }
    return ml_collections.ConfigDict(
        {"arms": fields, "stages": {"sft": {}, "dpo": {}}, "comparisons": comparisons or {}}
    )


def test_an_arm_comes_after_the_one_it_starts_from_and_pairs_after_sft():
    config = arms_config(
        b=("sft", "a"), d=("dpo", "base"), a=("sft", "base"), sft=("sft", "b"), e=("dpo", "d")
    )
    assert [arm.name for arm in posttrain.read_arms(config)] == ["a", "b", "sft", "d", "e"]


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (arms_config(a=("rl", "base")), "arms.a.stage='rl'.*sft"),
        (arms_config(a=("sft", "b")), "arms.a.start='b'.*base"),
        (arms_config(a=("sft", "b"), b=("sft", "a")), "a, b start from each other"),
        (arms_config(a=("dpo", "base")), "pairs come from the answers of an arm 'sft'"),
        (arms_config({"x": ("a", "c")}, a=("sft", "base")), "comparisons.x: there is no arm c"),
    ],
)
def test_arms_that_do_not_fit_together_are_refused(config, match):
    with pytest.raises(ConfigError, match=match):
        posttrain.read_arms(config)


@pytest.mark.parametrize("name", ["posttrain.py", "posttrain_study.py"])
def test_every_arm_of_a_shipped_config_is_valid(name, tmp_path):
    config = load_config(CONFIGS / name)
    for arm in posttrain.read_arms(config):
        cfg = posttrain.arm_config(config, arm, 1, tmp_path / "start", tmp_path / "data")
        assert cfg.seed == 1 and cfg.init.checkpoint == str(tmp_path / "start")


def test_a_change_that_no_config_knows_is_refused(tmp_path):
    config = load_config(CONFIGS / "posttrain.py")
    arm = posttrain.Arm("sft", "sft", "base", {"noise": {"colour": 1}})
    with pytest.raises(ConfigError, match="arms.sft.changes.*colour"):
        posttrain.arm_config(config, arm, 0, tmp_path, tmp_path)


def test_settings_are_a_cross_or_all_pairs():
    decoding = ml_collections.ConfigDict(
        {"thresholds": (0.9, 0.6), "block_sizes": (8, 32), "every_pair": False}
    )
    cross = [Setting(0.9, 32), Setting(0.6, 32), Setting(0.9, 8)]
    assert posttrain.settings(decoding, 32) == cross
    decoding.every_pair = True
    assert posttrain.settings(decoding, 32) == [Setting(t, b) for b in (8, 32) for t in (0.9, 0.6)]


@pytest.fixture
def evaluated(tmp_path):
    """The config, arm and training config of an arm that was evaluated at all settings."""
    config = load_config(CONFIGS / "posttrain.py")
    with config.unlocked():
        config.workdir = str(tmp_path)
    arm = posttrain.Arm("sft", "sft", "base", {})
    cfg = posttrain.arm_config(config, arm, 0, tmp_path, tmp_path)
    settings = posttrain.settings(config.decoding, 32)
    outcomes = [{"threshold": s.threshold, "block_size": s.block_size} for s in settings]
    asked = {"families": config.families.to_dict(), "tasks": config.tasks.to_dict()}
    path = Path(cfg.workdir) / "evaluation.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"asked": asked, "outcomes": outcomes, "seconds": 90.0}))
    return config, arm, cfg, path


@pytest.mark.parametrize("seconds", [90.0, None])
def test_what_is_finished_takes_the_seconds_that_it_took(evaluated, tmp_path, seconds):
    """An evaluation of an older version has no note of them."""
    *asked, path = evaluated
    kept = json.loads(path.read_text())
    if seconds is None:
        del kept["seconds"]
    path.write_text(json.dumps(kept))
    found = posttrain._decoded(*asked, tmp_path, [], time.perf_counter())
    assert found == {"outcomes": kept["outcomes"], "seconds": seconds}


def test_other_tasks_are_decoded_anew(evaluated, tmp_path, monkeypatch):
    config, arm, cfg, _ = evaluated
    with config.unlocked():
        config.tasks.test += 1
    monkeypatch.setattr(posttrain, "load_model", lambda model: None)
    monkeypatch.setattr(posttrain, "Engine", lambda *_, **__: None)

    def outcome(engine, tasks, setting, new):
        return posttrain.Outcome(setting.threshold, setting.block_size, {"x": [True]}, 1.0, 2.0)

    monkeypatch.setattr(posttrain, "evaluate", outcome)
    found = posttrain._decoded(config, arm, cfg, tmp_path, [], time.perf_counter())
    assert all(o["correct"] == {"x": [True]} for o in found["outcomes"])
    assert len(found["outcomes"]) == len(posttrain.settings(config.decoding, 32))
    assert found["seconds"] < 60.0  # without those of the outcomes that were let go


# ------------------------------------------------------------------------------------- report


def test_a_report_counts_the_time_of_all_calls_where_it_is_known():
    arms = {"sft": [{"seconds": 90.0}, {"seconds": 30.0}], "cap": [{"seconds": 60.0}]}
    assert arm_seconds(arms) == 180.0
    assert took(12.0, 180.0).startswith("3.0 minutes of training and decoding over all calls ")
    assert took(12.0, 180.0).endswith("0.2 minutes in the call that wrote this")
    arms["cap"][0]["seconds"] = None
    assert arm_seconds(arms) is None
    assert took(12.0, None).startswith("0.2 minutes in the call that wrote this (what was found")


def outcome(threshold, correct, speed=2.0):
    return {
        "threshold": threshold,
        "block_size": 32,
        "correct": correct,
        "tokens_per_forward": speed,
        "tokens_per_second": 100 * speed,
    }


def test_points_pool_the_families_that_count():
    runs = [
        {"outcomes": [outcome(0.9, {"a": [True, True], "b": [True, False]}, speed)]}
        for speed in (2.0, 4.0)
    ]
    [one] = arm_points(runs[:1], ["a", "b"])
    assert one.score == 0.75 and one.stderr == pytest.approx(0.25)  # over tasks
    runs[1]["outcomes"][0]["correct"]["a"] = [False, True]
    [two] = arm_points(runs, ["a"])
    assert (two.score, two.tokens_per_forward) == (0.75, 3.0)
    assert two.stderr == pytest.approx(0.25)  # over seeds: of 1 and 0.5, whatever their tasks


def test_families_are_judged_after_sft_at_the_strictest_threshold():
    schedule = {"schedule": {"posttrain_block": 32}}
    config = {
        "decoding": {"thresholds": (0.6, 0.9)},
        "families": {"a": {}, "b": {}},
        "arms": {"sft": {"stage": "sft", "changes": {}}},
        "stages": {"sft": schedule},
    }
    outcomes = [
        outcome(0.6, {"a": [False], "b": [False]}),
        outcome(0.9, {"a": [True], "b": [False]}),
    ]
    results = {"config": config, "arms": {"sft": [{"outcomes": outcomes}]}}
    assert family_scores(results) == {"a": 1.0, "b": 0.0}


def point(score, speed, stderr=0.05):
    return Point(0.9, 32, score, stderr, speed, 1.0)


def test_gain_compares_the_fastest_settings_of_equal_score():
    baseline = [point(0.80, 1.0), point(0.76, 1.5), point(0.5, 9.0)]
    found = gain([point(0.9, 1.0), point(0.75, 3.0), point(0.7, 7.0)], baseline)
    assert found is not None
    ratio, ours, theirs = found
    assert (ratio, ours.tokens_per_forward, theirs.tokens_per_forward) == (2.0, 3.0, 1.5)
    assert gain([point(0.7, 7.0)], baseline) is None


def test_a_gain_is_told_for_each_seed():
    """The second seed's arm never reaches its baseline, the third's is twice as fast."""
    slow, fast, low = point(0.8, 1.0), point(0.8, 2.0), point(0.1, 9.0)
    by_seed = {"sft": [[slow], [slow], [slow]], "cap": [[slow], [low], [fast]]}
    arms = {"sft": [slow], "cap": [fast]}
    [_, line] = posttrain_report._gains(arms, by_seed, {"sft": 32, "cap": 32})
    assert line.startswith("- cap: 2.00 times the tokens per forward of sft at equal score")
    assert line.endswith("Seed by seed: 1.00, never equal, 2.00.")
    [_, line] = posttrain_report._gains(
        arms, {n: points[:1] for n, points in by_seed.items()}, {"sft": 32, "cap": 32}
    )
    assert "Seed by seed" not in line


def test_preference_reports_the_last_validation_over_seeds():
    def line(kind, margin, accuracy):
        return {"kind": kind, "reward_margin": margin, "reward_accuracy": accuracy, "pairs": 4.0}

    def run(margin):
        held_out = [line("validation", 9.0, 0.0), line("validation", margin, 0.75)]
        return {"metrics": [*held_out, line("train", -5.0, 0.5)]}

    one = {"reward_margin": 1.0, "reward_accuracy": 0.75, "pairs": 4.0}
    assert preference([run(1.0)]) == one
    errors = {"reward_margin_stderr": 0.5, "reward_accuracy_stderr": 0.0, "pairs_stderr": 0.0}
    assert preference([run(1.0), run(2.0)]) == one | {"reward_margin": 1.5} | errors
    assert preference([{"metrics": [{"kind": "train", "loss": 1.0}]}]) == {}
