"""The pipeline itself, on a few thousand tokens: every stage, and a report with its files."""

import json
from pathlib import Path

from llada2_jax import quickstart
from llada2_jax.config import load_config
from tests.tiny_run import small_parent

CONFIGS = Path(__file__).parents[2] / "configs"


def small_source(folder: Path) -> Path:
    """Enough generated Python for both splits and for prompts of held-out functions."""
    folder.mkdir()
    for i in range(200):
        body = "".join(
            f"def function_{i}_{j}(x):\n    y = x + {j}\n    return y * {i}\n\n\n"
            for j in range(12)
        )
        (folder / f"module_{i}.py").write_text(body)
    return folder


def test_quickstart_runs_end_to_end(tmp_path):
    config = load_config(CONFIGS / "quickstart.py")
    config.workdir = str(tmp_path / "run")
    config.ar.init.checkpoint = str(small_parent(tmp_path / "parent"))
    source = str(small_source(tmp_path / "source"))
    for stage in (config.ar, config.conversion):
        stage.data.source = source
        stage.data.row_length = 64
        stage.data.rows_per_step = 4
        stage.eval.rows = 4
        stage.runtime.dtype = "float32"  # what the exact check and the speed test compute in
    config.ar.schedule.ar_tokens = 512
    schedule = config.conversion.schedule
    schedule.warmup_blocks, schedule.warmup_tokens, schedule.stable_tokens = (4,), 256, 0
    schedule.decay_blocks, schedule.decay_tokens = (16,), 512
    config.conversion.checkpoint.every_tokens = 256
    config.merge_top_k = 2
    report = config.report
    report.eval_rows, report.exact_rows, report.prompts = 8, 4, 2
    report.block_sizes, report.prompt_tokens, report.max_new_tokens = (1, 16), 32, 16
    report.thresholds, report.speed_tokens = (0.9, 0.5), 32
    path = quickstart.run(config)
    figures = json.loads((path.parent / "report.json").read_text())
    assert figures["speed"]["same_tokens"] and figures["speed"]["compiles_per_shape"] == 1
    assert figures["exact_check"]["largest_difference"] < 1e-4
    assert len(figures["generation"]) == 2 and len(figures["samples"]) == 2
    for name in ("loss.png", "bits_per_byte.png", "thresholds.png", "trajectory.png"):
        assert (path.parent / name).stat().st_size > 1000
        assert f"({name})" in path.read_text()
