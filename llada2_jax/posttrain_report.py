"""report.md, report.json and the plots of `llada2 posttrain`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - the backend has to be chosen first
import numpy as np  # noqa: E402

from llada2_jax.run_folder import machine  # noqa: E402

FIRST = "sft"  # the arm whose scores decide which families count


@dataclasses.dataclass(frozen=True)
class Point:
    """An arm at one setting, over seeds and the families that count. score: share of right answers;
    stderr: its standard error over tasks, or over seeds where there are several; the rest are means
    over seeds."""

    threshold: float
    block_size: int
    score: float
    stderr: float
    tokens_per_forward: float
    tokens_per_second: float


def write(work: Path, results: dict[str, Any]) -> Path:
    """Writes the report's files into `work`; returns the path of report.md.

    results: config; arms: {name: one a seed of {seed, outcomes, seconds, metrics}}; gym; seconds.
    """
    work.mkdir(parents=True, exist_ok=True)
    families = family_scores(results)
    counted = [name for name, score in families.items() if score >= results["config"]["reached"]]
    pooled = counted or list(families)
    points = {arm: arm_points(runs, pooled) for arm, runs in results["arms"].items()}
    by_seed = {
        arm: [arm_points([run], pooled) for run in runs] for arm, runs in results["arms"].items()
    }
    trained = {arm: _trained_block(results, arm) for arm in points}
    for name, members in results["config"]["comparisons"].items():
        for kind, plot in (("thresholds", _plot_thresholds), ("blocks", _plot_blocks)):
            figure = plot({arm: points[arm] for arm in members}, trained)
            figure.savefig(work / f"{name}-{kind}.png", dpi=130, bbox_inches="tight")
            plt.close(figure)
    shown = {
        "machine": machine(),
        "config": results["config"],
        "gym": results["gym"],
        "seconds": results["seconds"],
        "seconds_of_all_calls": arm_seconds(results["arms"]),
        "families": families,
        "counted": counted,
        "points": {arm: _records(ps) for arm, ps in points.items()},
        "by_seed": {arm: [_records(ps) for ps in seeds] for arm, seeds in by_seed.items()},
        "preference": {arm: preference(runs) for arm, runs in results["arms"].items()},
    }
    (work / "report.json").write_text(json.dumps(shown, indent=1))
    path = work / "report.md"
    path.write_text(_markdown(results, shown, points, by_seed, trained))
    return path


def _records(points: Sequence[Point]) -> list[dict[str, float]]:
    return [dataclasses.asdict(point) for point in points]


def arm_seconds(arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> float | None:
    """Spent on all arms, whichever call did it; None where that is not known of each."""
    spent = [run["seconds"] for runs in arms.values() for run in runs]
    return None if None in spent else sum(spent)


def family_scores(results: Mapping[str, Any]) -> dict[str, float]:
    """Score of each family after SFT at the strictest threshold, over seeds."""
    config = results["config"]
    strictest = max(config["decoding"]["thresholds"])
    block = _trained_block(results, FIRST)
    outcomes = [
        outcome
        for run in results["arms"][FIRST]
        for outcome in run["outcomes"]
        if (outcome["threshold"], outcome["block_size"]) == (strictest, block)
    ]
    return {
        family: float(np.mean([np.mean(o["correct"][family]) for o in outcomes]))
        for family in config["families"]
    }


def arm_points(runs: Sequence[Mapping[str, Any]], families: Sequence[str]) -> list[Point]:
    """One Point a setting, in the order of the settings."""
    by_setting: dict[tuple[float, int], list[Mapping[str, Any]]] = {}
    for run in runs:
        for outcome in run["outcomes"]:
            key = (outcome["threshold"], outcome["block_size"])
            by_setting.setdefault(key, []).append(outcome)
    points = []
    for (threshold, block), outcomes in by_setting.items():
        scores = [np.concatenate([o["correct"][f] for f in families]) for o in outcomes]
        means = [float(np.mean(s)) for s in scores]
        spread = scores[0] if len(means) == 1 else np.asarray(means)
        points.append(
            Point(
                threshold,
                block,
                float(np.mean(means)),
                float(np.std(spread, ddof=1) / np.sqrt(len(spread))),
                float(np.mean([o["tokens_per_forward"] for o in outcomes])),
                float(np.mean([o["tokens_per_second"] for o in outcomes])),
            )
        )
    return points


def gain(points: Sequence[Point], baseline: Sequence[Point]) -> tuple[float, Point, Point] | None:
    """How many times as many tokens a forward gives at equal score, and at which settings.

    Equal: no lower than the baseline's best score less its standard error. Each side takes its
    fastest setting of those. None: `points` never reach it.
    """
    best = max(baseline, key=lambda p: p.score)
    enough = best.score - best.stderr

    def fastest(candidates):
        return max(
            (p for p in candidates if p.score >= enough),
            key=lambda p: p.tokens_per_forward,
            default=None,
        )

    ours, theirs = fastest(points), fastest(baseline)
    if ours is None or theirs is None:
        return None
    return ours.tokens_per_forward / theirs.tokens_per_forward, ours, theirs


def preference(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Margin and accuracy of the rewards in the last validation of a DPO run, over seeds, and where
    these are several their standard errors."""
    found = [
        [m for m in run["metrics"] if m["kind"] == "validation" and "reward_margin" in m]
        for run in runs
    ]
    if not all(found):
        return {}
    names = ("reward_margin", "reward_accuracy", "pairs")
    values = {name: [lines[-1][name] for lines in found] for name in names}
    means = {name: float(np.mean(each)) for name, each in values.items()}
    if len(found) == 1:
        return means
    errors = {f"{n}_stderr": float(np.std(v, ddof=1) / len(v) ** 0.5) for n, v in values.items()}
    return means | errors


def _trained_block(results: Mapping[str, Any], arm: str) -> int:
    fields = results["config"]["arms"][arm]
    stage = results["config"]["stages"][fields["stage"]]["schedule"]["posttrain_block"]
    return fields["changes"].get("schedule", {}).get("posttrain_block", stage)


# ------------------------------------------------------------------------------------------ plots


def _at_block(points: Sequence[Point], block: int) -> list[Point]:
    return sorted((p for p in points if p.block_size == block), key=lambda p: p.threshold)


def _plot_thresholds(arms: Mapping[str, Sequence[Point]], trained: Mapping[str, int]):
    """Score against tokens per forward; along each line the threshold falls (Figure 3)."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for arm, points in arms.items():
        line = _at_block(points, trained[arm])
        speeds, scores = [p.tokens_per_forward for p in line], [p.score for p in line]
        axes.errorbar(
            speeds, scores, [p.stderr for p in line], fmt="o-", ms=4, capsize=2, label=arm
        )
        for point in (line[0], line[-1]):
            axes.annotate(
                f"{point.threshold:g}",
                (point.tokens_per_forward, point.score),
                textcoords="offset points",
                xytext=(4, 4),
                fontsize=7,
            )
    axes.set_xlabel("tokens per forward")
    axes.set_ylabel("share of right answers")
    axes.legend(fontsize=8, frameon=False)
    return figure


def _plot_blocks(arms: Mapping[str, Sequence[Point]], trained: Mapping[str, int]):
    """Score and tokens per forward against the block size of decoding (Figure 4)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for arm, points in arms.items():
        line = sorted((p for p in points if p.threshold == 0.9), key=lambda p: p.block_size)
        sizes = [p.block_size for p in line]
        left.errorbar(
            sizes, [p.score for p in line], [p.stderr for p in line], fmt="o-", ms=4, label=arm
        )
        right.plot(sizes, [p.tokens_per_forward for p in line], "o-", ms=4)
    for axes, label in ((left, "share of right answers"), (right, "tokens per forward")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("block size of decoding (threshold 0.9)")
        axes.set_ylabel(label)
    left.legend(fontsize=8, frameon=False)
    return figure


# --------------------------------------------------------------------------------------- markdown


def _markdown(results, shown, points: Mapping[str, list[Point]], by_seed, trained) -> str:
    machine, config = shown["machine"], results["config"]
    seeds = len(config["seeds"])
    over = "seeds" if seeds > 1 else "tasks"
    families = ", ".join(f"{n} {s:.0%}" for n, s in shown["families"].items())
    counted = ", ".join(shown["counted"]) or "none: all are shown, and nothing is claimed"
    lines = [
        "# Post-training: SFT, CAP and DPO on tasks that can be checked",
        "",
        f"`llada2 posttrain`, {took(shown['seconds'], shown['seconds_of_all_calls'])}. "
        f"Python {machine['python']}, jax {machine['jax']}, {machine['device']}, "
        f"{machine['cores']} cores. Tasks: reasoning-gym {shown['gym']}, "
        f"{config['tasks']['test']} test questions of each family, none of them trained on. "
        f"Seeds: {seeds}.",
        "",
        f"Right answers after SFT by family: {families}. Counted below (at least "
        f"{config['reached']:.0%}): {counted}.",
        "",
        f"Scores are shares of right answers, ± the standard error over {over}.",
    ]
    for name, members in config["comparisons"].items():
        arms = {arm: points[arm] for arm in members}
        lines += _comparison(name, arms, trained)
        if shown["counted"]:
            lines += _gains(arms, by_seed, trained)
    rewards = {arm: values for arm, values in shown["preference"].items() if values}
    return "\n".join(lines + _preferences(rewards)) + "\n"


def _preferences(rewards: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not rewards:
        return []
    lines = ["", "## Preferences", ""]
    lines += ["| arm | reward margin | reward accuracy | held-out pairs |", "|---|---|---|---|"]
    for arm, values in rewards.items():
        margin, accuracy = f"{values['reward_margin']:.3f}", f"{values['reward_accuracy']:.1%}"
        if "reward_margin_stderr" in values:
            margin += f" ± {values['reward_margin_stderr']:.3f}"
            accuracy += f" ± {values['reward_accuracy_stderr']:.1%}"
        lines.append(f"| {arm} | {margin} | {accuracy} | {values['pairs']:.0f} |")
    return lines


def took(seconds: float, all_calls: float | None) -> str:
    """How long the report was in the making. seconds: of the call that writes it."""
    last = f"{seconds / 60:.1f} minutes in the call that wrote this"
    if all_calls is None:
        return f"{last} (what was found finished is not run again)"
    whole = f"{all_calls / 60:.1f} minutes of training and decoding over all calls"
    return f"{whole} (what was lost where one was stopped aside), {last}"


def _comparison(name: str, arms: Mapping[str, list[Point]], trained) -> list[str]:
    lines = ["", f"## {name.replace('_', ' ').capitalize()}", ""]
    lines += [f"![thresholds]({name}-thresholds.png)", "", f"![block sizes]({name}-blocks.png)"]
    lines += ["", "| arm | threshold | block | score | tokens/forward | tokens/s |"]
    lines += ["|---|---|---|---|---|---|"]
    for arm, points in arms.items():
        for p in sorted(points, key=lambda p: (p.block_size, -p.threshold)):
            lines.append(
                f"| {arm} | {p.threshold:g} | {p.block_size} | {p.score:.3f} ± {p.stderr:.3f} | "
                f"{p.tokens_per_forward:.2f} | {p.tokens_per_second:.0f} |"
            )
    return lines


def _gains(arms: Mapping[str, list[Point]], by_seed, trained) -> list[str]:
    """What each arm gains over the first."""
    first, *others = arms

    def found(points, baseline, arm):
        return gain(_at_block(points, trained[arm]), _at_block(baseline, trained[first]))

    lines = [""]
    for arm in others:
        line = _gain_line(arm, found(arms[arm], arms[first], arm), first)
        pairs = zip(by_seed[arm], by_seed[first], strict=True)
        seeds = [found(ours, theirs, arm) for ours, theirs in pairs]
        if len(seeds) > 1:
            each = ", ".join("never equal" if g is None else f"{g[0]:.2f}" for g in seeds)
            line += f" Seed by seed: {each}."
        lines.append(line)
    return lines


def _gain_line(arm: str, found: tuple[float, Point, Point] | None, first: str) -> str:
    if found is None:
        return f"- {arm}: does not reach the score of {first}, less its standard error."
    ratio, ours, theirs = found
    return (
        f"- {arm}: {ratio:.2f} times the tokens per forward of {first} at equal score "
        f"({ours.tokens_per_forward:.2f} at threshold {ours.threshold:g} with {ours.score:.3f}, "
        f"against {theirs.tokens_per_forward:.2f} at {theirs.threshold:g} with {theirs.score:.3f})."
    )
