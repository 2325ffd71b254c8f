"""The quickstart's report: what was measured is shown, and what was not is left out."""

import json

import matplotlib.pyplot as plt
import pytest

from llada2_jax import quickstart_report

PHASES = ("warmup-4", "stable-64", "decay-32")


def results(*, rate_buckets: int):
    """The figures of a run of three steps a phase."""
    lines = []
    for index, phase in enumerate(PHASES):
        for step in (1, 2, 3):
            place = {"step": 3 * index + step, "tokens": 64 * (3 * index + step), "phase": phase}
            lines.append({"kind": "train", "loss": 5.0 - index, "block_size": 4, **place})
        if rate_buckets:
            norms = [float(index + bucket) for bucket in range(rate_buckets)]
            lines.append({"kind": "grad_norm_by_rate", "norms": norms, **place})
        scores = {"bits_per_byte": 2.0, "bits_per_byte_stderr": 0.1, "nats_per_token": 4.0}
        measured = {"measured": f"{phase}:bdlm-4", **scores}
        lines.append({"kind": "validation", **measured, **place})
    by_block = {"4": scores, "32": scores}
    split = {"documents": 3, "tokens": 1000, "bytes": 4000}
    return {
        "config": {},
        "seconds": 60.0,
        "corpus": {"train": split, "validation": split},
        "runs": {"ar": [], "conversion": lines},
        "bits_per_byte": {
            "AR parent": {"ar": scores},
            "AR continued": {"ar": scores},
            "best single": by_block,
            "merged": by_block,
        },
        "merge": {
            "kind": "decay-32:bdlm-4",
            "steps": [9, 8],
            "bits_per_byte": [2.0, 2.1],
            "gain": {"4": {"bits_per_byte": -0.0125, "stderr": 0.002}},
        },
        "exact_check": {
            "tokens": 10,
            "bound_nats": 40.0,
            "chain_nats": 40.0,
            "largest_difference": 1e-6,
        },
        "generation": [
            {
                "threshold": threshold,
                "tokens_per_forward": 1.5,
                "tokens_per_forward_with_commits": 1.4,
                "tokens_per_second": [99.0, 101.0, 90.0],
            }
            for threshold in (0.9, 0.5)
        ],
        "trajectory": {"threshold": 0.9, "accepted_at": [0, 0, 1], "confidence": [0.9, 1.0, 0.8]},
        "speed": {
            "new_tokens": 8,
            "cached_seconds": 1.0,
            "uncached_seconds": 4.0,
            "uncached_over_cached": 4.0,
            "same_tokens": True,
            "compiles_per_shape": 1,
            "input_wait_fraction": 0.0123,
        },
        "samples": [{"file": "a.py", "prompt": "def f():", "completions": {"0.9": "pass"}}],
    }


def test_the_report_shows_what_was_measured(tmp_path):
    text = quickstart_report.write(tmp_path, results(rate_buckets=4)).read_text()
    plots = sorted(path.name for path in tmp_path.glob("*.png"))
    names = ["bits_per_byte", "grad_norms", "loss", "thresholds", "trajectory"]
    assert plots == [f"{name}.png" for name in names]
    assert all(f"]({plot})" in text for plot in plots)
    assert "| merged | diffusion bound, 32 | 2.0000 ± 0.1000 | 4.0000 |" in text
    assert "-0.0125 ± 0.0020 at 4" in text
    assert "| 0.5 | 1.50 | 1.40 | 99 (90, 101) |" in text
    assert "4.00 times as long" in text and "waited for input: 1.23%" in text
    figures = json.loads((tmp_path / "report.json").read_text())
    assert [line["phase"] for line in figures["validation"]["conversion"]] == list(PHASES)
    assert "runs" not in figures  # every step's metrics stay in the runs' own files


def test_tokens_that_differ_are_shouted(tmp_path):
    figures = results(rate_buckets=0)
    figures["speed"]["same_tokens"] = False
    assert "BUT THE TOKENS DIFFER" in quickstart_report.write(tmp_path, figures).read_text()


def test_without_rate_buckets_there_is_no_gradient_plot(tmp_path):
    text = quickstart_report.write(tmp_path, results(rate_buckets=0)).read_text()
    assert "grad_norms" not in text and not (tmp_path / "grad_norms.png").exists()


@pytest.mark.parametrize("buckets", [1, 4])
def test_gradient_norms_are_bars_of_range_and_phase(buckets):
    figure = quickstart_report._plot_grad_norms(results(rate_buckets=buckets))
    (axes,) = figure.axes
    bars = sorted(axes.patches, key=lambda bar: bar.get_x())
    want = [phase + bucket for phase in range(len(PHASES)) for bucket in range(buckets)]
    assert [bar.get_height() for bar in bars] == want
    centers = [bar.get_x() + bar.get_width() / 2 for bar in bars]
    assert [round(center) for center in centers] == [p for p in range(3) for _ in range(buckets)]
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        phase.replace("-", "\n") for phase in PHASES
    ]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert (labels[0], labels[-1]) == (
        ("0 to 1",) * 2 if buckets == 1 else ("0 to 0.25", "0.75 to 1")
    )
    plt.close(figure)
