"""The quickstart's conversion: Warmup-Stable-Decay on the 4.3M-parameter parent.

    llada2 train --config=configs/tiny_wsd.py --workdir=runs/my_conversion

Block sizes 1 -> 4 -> 32 -> 64 -> row length -> 64 -> 32, after the paper's 1 -> 4 -> 32 -> 64 ->
4096 -> ... -> 32; tokens of each stage, the learning rate and the embedding noise are ours (the
paper prints none of them). What it gave is in docs/quickstart-long/.
"""

from pathlib import Path

from llada2_jax.assets import TINY_AR
from llada2_jax.config import load_config

HERE = Path(__file__).parent


def get_config():
    config = load_config(HERE / "tiny_ar.py")  # rows, optimizer and validation are the parent's
    config.workdir = "runs/tiny_wsd"
    with config.unlocked():
        config.model = {}
    config.init.checkpoint = str(TINY_AR)
    config.schedule.ar_tokens = 0
    config.schedule.warmup_blocks = (1, 4, 32, 64)
    config.schedule.warmup_tokens = 1_000_000
    config.schedule.stable_tokens = 2_000_000
    config.schedule.decay_blocks = (64, 32)
    config.schedule.decay_tokens = 1_800_000
    config.optimizer.learning_rate = 1e-3
    config.optimizer.decay_fraction = 0.4
    config.embedding_noise.sigma = 0.05
    config.embedding_noise.tokens = 300_000
    config.eval.every_tokens = 400_000
    config.checkpoint.every_tokens = 200_000
    config.checkpoint.keep_best = 4
    return config
