"""Continual pretraining of LLaDA2.0-flash (100B): Ling-flash-base-2.0 to block diffusion (§4).

    llada2 plan  --config=configs/cpt_flash.py --slice=v6e-64
    llada2 train --config=configs/cpt_flash.py --config.init.checkpoint=FOLDER FLAGS

FLAGS are the last line that `plan` prints. `plan` for v6e-64, by libtpu: 26.2 of 31.2 GiB, experts
with room for twice a balanced load. Roofline, not measured: 330k to 651k tokens/s, links in turn or
all overlapped. Other slices: docs/plan.md.

The schedule is configs/cpt_mini.py's, whose docstring says what the paper prints and what is ours.
With fp32 master weights instead of bf16 ones: --config.runtime.param_dtype=float32. On fewer chips
than rows, `plan` chooses optimizer.accumulate, whose sums take 4 bytes a parameter; the smallest
slices need --config.data.rows_per_step=N for N chips.
"""

from pathlib import Path

from llada2_jax.config import load_config


def get_config():
    config = load_config(Path(__file__).parent / "cpt_mini.py")
    config.workdir = "runs/cpt_flash"
    config.init.checkpoint = "checkpoints/Ling-flash-base-2.0"
    config.init.architecture = "flash"
    return config
