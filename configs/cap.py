"""Confidence-aware parallel training of the fine-tuned model (§5.2, docs/posttraining.md).

    llada2 train --config=configs/cap.py --config.cap.weight=0.5
    llada2 merge runs/cap --out runs/cap/merged

    llada2 train --config=configs/cap.py:mini                  # or flash

Goes on where configs/sft.py ended, on its data with its noise, at a tenth of its learning rate.
"""

from pathlib import Path

from llada2_jax.config import load_config


def get_config(model="quickstart"):
    """model: "quickstart", "mini" (16B) or "flash" (100B)."""
    config = load_config(Path(__file__).parent / "sft.py", model)
    config.init.checkpoint = f"{config.workdir}/merged"
    config.workdir = config.workdir.replace("sft", "cap")
    config.schedule.cap_tokens = config.schedule.sft_tokens // 2
    config.schedule.sft_tokens = 0
    config.cap.weight = 2.0
    config.cap.temperature = 1.0
    config.optimizer.learning_rate /= 10
    return config
