"""Confidence-aware parallel training of the fine-tuned model (§5.2, docs/posttraining.md).

    llada2 train --config=configs/cap.py --config.cap.weight=0.5
    llada2 merge runs/cap --out runs/cap/merged

Goes on where configs/sft.py ended, on its data with its noise, at its last learning rate.
"""

from pathlib import Path

from llada2_jax.config import load_config

HERE = Path(__file__).parent


def get_config():
    config = load_config(HERE / "sft.py")
    config.workdir = "runs/cap"
    config.init.checkpoint = "runs/sft/merged"
    config.schedule.sft_tokens = 0
    config.schedule.cap_tokens = 200_000
    config.cap.weight = 2.0
    config.cap.temperature = 1.0
    config.optimizer.learning_rate = 2e-5
    return config
