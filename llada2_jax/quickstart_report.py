"""report.md, report.json and the plots of a quickstart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - the backend has to be chosen first
import numpy as np  # noqa: E402

from llada2_jax.run_folder import machine  # noqa: E402

BLUE, ORANGE, GREY = "#1f6fb4", "#d9661f", "#8a8a8a"

SAMPLES = 4  # completions printed in report.md

GRAD_NORMS = ("conversion", "grad_norm_by_rate")  # absent where eval.rate_buckets is 0


def write(work: Path, results: dict[str, Any]) -> Path:
    """Writes the report's files into `work`; returns the path of report.md."""
    results["machine"] = machine()
    plots = {
        "loss.png": _plot_loss,
        "bits_per_byte.png": _plot_bits,
        "thresholds.png": _plot_thresholds,
        "trajectory.png": _plot_trajectory,
    }
    if _lines(results, *GRAD_NORMS):
        plots["grad_norms.png"] = _plot_grad_norms
    for name, plot in plots.items():
        figure = plot(results)
        figure.savefig(work / name, dpi=130, bbox_inches="tight")
        plt.close(figure)
    shown = {k: v for k, v in results.items() if k != "runs"}
    shown["validation"] = _validation(results)
    (work / "report.json").write_text(json.dumps(shown, indent=1))
    path = work / "report.md"
    path.write_text(_markdown(results))
    return path


def _lines(results, run: str, kind: str) -> list[dict]:
    return [m for m in results["runs"].get(run, []) if m["kind"] == kind]


def _validation(results) -> dict[str, list[dict]]:
    """Every validation of every run. What they `measured` says which compare."""
    keep = ("step", "tokens", "phase", "measured", "block_size", "bits_per_byte")
    keep += ("bits_per_byte_stderr",)
    return {
        run: [{k: m[k] for k in keep if k in m} for m in _lines(results, run, "validation")]
        for run in results["runs"]
    }


def _plot_loss(results):
    """Training loss and validation through the phases, the block size written above each."""
    figure, axes = plt.subplots(figsize=(10, 4.2))
    train = _lines(results, "conversion", "train")
    tokens = np.asarray([m["tokens"] for m in train]) / 1e6
    loss = np.asarray([m["loss"] for m in train])
    axes.plot(tokens, loss, color=BLUE, alpha=0.25, lw=0.7)
    width = max(1, len(loss) // 60)
    smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
    axes.plot(tokens[width - 1 :], smooth, color=BLUE, label="training loss (nats a token)")
    start = 0
    phases = [m["phase"] for m in train]
    last_stage = ""
    for i in range(1, len(train) + 1):
        if i == len(train) or phases[i] != phases[start]:
            axes.axvline(tokens[i - 1], color=GREY, lw=0.5)
            middle = (tokens[start] + tokens[i - 1]) / 2
            stage, size = phases[start].split("-")
            label = f"{stage}\n{size}" if stage != last_stage else f"\n{size}"
            last_stage = stage
            axes.text(
                middle,
                1.01,
                label,
                ha="center",
                va="bottom",
                fontsize=8,
                transform=axes.get_xaxis_transform(),
            )
            start = i
    marks = [m for m in results["runs"]["conversion"] if "nats_per_token" in m]
    axes.plot(
        [m["tokens"] / 1e6 for m in marks],
        [m["nats_per_token"] for m in marks],
        "o",
        color=ORANGE,
        ms=4,
        label="validation, the phase's own objective",
    )
    low, high = np.percentile(loss, [0.5, 97])
    axes.set_ylim(low * 0.9, high * 1.15)
    axes.set_xlabel("clean tokens (millions)")
    axes.set_ylabel("nats a token")
    axes.legend(loc="lower left", fontsize=8, frameon=False)
    return figure


def _plot_grad_norms(results):
    """Gradient norm at the end of each phase, a bar for each range of the mask rate."""
    figure, axes = plt.subplots(figsize=(10, 3.6))
    lines = _lines(results, *GRAD_NORMS)
    ranges = len(lines[0]["norms"])
    norms = np.asarray([m["norms"] for m in lines])  # [phases, ranges]
    edges, width = np.linspace(0, 1, ranges + 1), 0.8 / ranges
    for i, color in enumerate(plt.get_cmap("viridis")(np.linspace(0.15, 0.85, ranges))):
        places = np.arange(len(lines)) + (i - (ranges - 1) / 2) * width
        label = f"{edges[i]:.3g} to {edges[i + 1]:.3g}"
        axes.bar(places, norms[:, i], width, color=color, label=label)
    axes.set_xticks(range(len(lines)), [m["phase"].replace("-", "\n") for m in lines])
    axes.set_ylabel("gradient norm")
    axes.legend(title="mask rate", fontsize=8, title_fontsize=8, frameon=False)
    return figure


def _plot_bits(results):
    figure, axes = plt.subplots(figsize=(7, 4))
    table = results["bits_per_byte"]
    for name, color in (("best single", BLUE), ("merged", ORANGE)):
        row = table[name]
        axes.errorbar(
            range(len(row)),
            [v["bits_per_byte"] for v in row.values()],
            [v["bits_per_byte_stderr"] for v in row.values()],
            fmt="o-",
            color=color,
            label=name,
            capsize=2,
        )
    for name, style in (("AR parent", "--"), ("AR continued", ":")):
        value = table[name]["ar"]["bits_per_byte"]
        axes.axhline(value, color=GREY, ls=style, label=f"{name}: {value:.3f}")
    axes.set_xticks(range(len(table["merged"])), list(table["merged"]))
    axes.set_xlabel("block size of the bound (1 is exact)")
    axes.set_ylabel("bits a byte, validation")
    axes.legend(fontsize=8, frameon=False)
    return figure


def _plot_thresholds(results):
    figure, axes = plt.subplots(figsize=(6.5, 4))
    rows = results["generation"]
    thresholds = [str(r["threshold"]) for r in rows]
    axes.plot(
        thresholds,
        [r["tokens_per_forward"] for r in rows],
        "o-",
        color=BLUE,
        label="tokens a denoising forward",
    )
    axes.plot(
        thresholds,
        [r["tokens_per_forward_with_commits"] for r in rows],
        "o--",
        color=BLUE,
        label="tokens a forward, commits counted",
    )
    axes.set_xlabel("threshold")
    axes.set_ylabel("tokens per forward")
    right = axes.twinx()
    right.plot(
        thresholds,
        [np.median(r["tokens_per_second"]) for r in rows],
        "s-",
        color=ORANGE,
        label="tokens/s (median)",
    )
    right.set_ylabel("tokens/s")
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, fontsize=8, frameon=False)
    return figure


def _plot_trajectory(results):
    """One completion: where each position was accepted, and how sure the model was."""
    figure, axes = plt.subplots(figsize=(10, 4.5))
    t = results["trajectory"]
    steps, confidence = np.asarray(t["accepted_at"]), np.asarray(t["confidence"])
    points = axes.scatter(
        range(len(steps)), steps, c=confidence, cmap="viridis", s=14, vmin=0, vmax=1
    )
    figure.colorbar(points, label="confidence when accepted")
    axes.set_xlabel("position in the completion")
    axes.set_ylabel("denoising forward")
    axes.set_title(f"one completion, threshold {t['threshold']}", fontsize=10)
    return figure


def _markdown(results: dict[str, Any]) -> str:
    parts = [
        "# Quickstart: from an autoregressive model to block diffusion",
        f"`llada2 quickstart`, {results['seconds'] / 60:.1f} minutes in the call that wrote this "
        f"(stages found finished are not run again). {_machine(results)}",
        _corpus(results),
        _parent_section(results),
        "## Loss through the phases\n\n![loss](loss.png)\n\n"
        "Each phase has its own objective, so losses compare only within a phase.",
        *_grad_norm_section(results),
        _bits_section(results),
        _generation_section(results),
        _speed_section(results),
        _samples_section(results),
    ]
    return "\n\n".join(parts) + "\n"


def _machine(results) -> str:
    m = results["machine"]
    return f"Python {m['python']}, jax {m['jax']}, {m['device']}, {m['cores']} cores."


def _corpus(results) -> str:
    rows = [
        f"| {name} | {part['documents']} | {part['tokens']:,} | {part['bytes'] / 1e6:.2f} |"
        for name, part in results["corpus"].items()
    ]
    head = "| split | files | tokens | MB |\n|---|---|---|---|\n"
    return "The Python standard library's source, split by path hash.\n\n" + head + "\n".join(rows)


def _parent_section(results) -> str:
    """Training losses at both ends of the autoregressive runs."""
    names = {"parent": "trained from scratch", "ar": "the shipped parent, continued"}
    lines = []
    for run, name in names.items():
        train = _lines(results, run, "train")
        if train:
            loss, some = [m["loss"] for m in train], max(1, len(train) // 10)
            lines.append(
                f"| {name} | {train[-1]['tokens']:,} | {np.mean(loss[:some]):.3f} "
                f"| {np.mean(loss[-some:]):.3f} |"
            )
    head = "| run | clean tokens | loss of the first tenth of its steps | of the last tenth |\n"
    return (
        "## The autoregressive parent\n\n"
        + head
        + "|---|---|---|---|\n"
        + "\n".join(lines)
        + "\n\n"
        "Training loss in nats a token, each step on its own rows. The shipped parent had ended "
        "its learning-rate schedule: a short continuation at a small rate shows that training "
        "runs, and moves validation (below) by its noise only."
    )


def _grad_norm_section(results) -> list[str]:
    if not _lines(results, *GRAD_NORMS):
        return []
    return [
        "## Gradient norm by mask rate\n\n![gradient norms](grad_norms.png)\n\n"
        "Of the last step of each phase, from the tokens whose block (or row) was masked at a rate "
        "in that range; at block size 1 every rate is 1."
    ]


def _bits_section(results) -> str:
    lines = ["| model | objective, block size | bits a byte | nats a token |", "|---|---|---|---|"]
    for name, row in results["bits_per_byte"].items():
        for block, v in row.items():
            what = "AR, exact" if block == "ar" else f"diffusion bound, {block}"
            lines.append(
                f"| {name} | {what} | {v['bits_per_byte']:.4f} ± {v['bits_per_byte_stderr']:.4f} "
                f"| {v['nats_per_token']:.4f} |"
            )
    check, merge = results["exact_check"], results["merge"]
    best = ", ".join(
        f"{s}: {b:.4f}" for s, b in zip(merge["steps"], merge["bits_per_byte"], strict=True)
    )
    gain = ", ".join(
        f"{g['bits_per_byte']:+.4f} ± {g['stderr']:.4f} at {block}"
        for block, g in merge["gain"].items()
    )
    return (
        "## Bits per byte\n\nAll on the same validation bytes; ± is the standard error over rows, "
        "which the rows shared by all models mostly have in common.\n\n"
        + "\n".join(lines)
        + "\n\n![bits per byte](bits_per_byte.png)\n\n"
        f"Merged: steps {best} (kind `{merge['kind']}`). Merged minus best single, with the "
        f"standard error over the rows they share: {gain}.\n\n"
        f"Check: over {check['tokens']} tokens the bound at block size 1 is "
        f"{check['bound_nats']:.3f} nats, the model's own left-to-right likelihood through the "
        f"decoding cache {check['chain_nats']:.3f}; largest difference of a token "
        f"{check['largest_difference']:.1e} (fp32)."
    )


def _generation_section(results) -> str:
    lines = [
        "| threshold | tokens/forward | with commits | tokens/s: median (lowest, highest) |",
        "|---|---|---|---|",
        *(
            f"| {r['threshold']} | {r['tokens_per_forward']:.2f} "
            f"| {r['tokens_per_forward_with_commits']:.2f} | {_spread(r['tokens_per_second'])} |"
            for r in results["generation"]
        ),
    ]
    return (
        "## Decoding the merged model\n\n"
        + "\n".join(lines)
        + "\n\n![thresholds](thresholds.png)\n\n![trajectory](trajectory.png)"
    )


def _spread(values: list[float]) -> str:
    return f"{np.median(values):.0f} ({min(values):.0f}, {max(values):.0f})"


def _speed_section(results) -> str:
    s = results["speed"]
    same = "fp32, the same tokens" if s["same_tokens"] else "fp32, BUT THE TOKENS DIFFER"
    return (
        "## Speed, as ratios within this run\n\n"
        f"- {s['new_tokens']} new tokens: recomputing the prefix takes "
        f"{s['uncached_over_cached']:.2f} times as long as the KV cache "
        f"({s['uncached_seconds']:.2f} s against {s['cached_seconds']:.2f} s; {same}).\n"
        f"- Programs compiled for a shape bucket: {s['compiles_per_shape']}.\n"
        f"- Share of the conversion's training time in which the model waited for input: "
        f"{s['input_wait_fraction']:.2%}."
    )


def _samples_section(results) -> str:
    parts = ["## Completions of held-out functions"]
    shown = results["samples"][:SAMPLES]
    if len(shown) < len(results["samples"]):
        parts.append(f"{len(shown)} of {len(results['samples'])}; report.json has all.")
    for sample in shown:
        parts.append(f"### `{sample['file']}`\n\nPrompt:\n\n```python\n{sample['prompt']}\n```")
        for threshold, text in sample["completions"].items():
            parts.append(f"Threshold {threshold}:\n\n```python\n{text}\n```")
    return "\n\n".join(parts)
