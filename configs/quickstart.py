"""`make quickstart`: the whole conversion at laptop scale, from the shipped parent to a report.

    llada2 quickstart                      # minutes on two CPU cores; runs/quickstart/report.md
    llada2 quickstart --config.conversion.schedule.stable_tokens=1000000
    llada2 plan --config=configs/tiny_wsd.py --slice=v5litepod-1 --nocompile   # on a TPU

It needs no slice: two CPU cores convert 2.3k tokens/s, validation and checkpoints included. `plan`
bounds one v5e chip at 6.9M tokens/s, a roofline that no model as small as this comes near.

Three training configs and what the report measures. A few hundred thousand tokens convert the form
of the model, not yet its quality: for that, see configs/quickstart_long.py.
"""

from pathlib import Path

import ml_collections

from llada2_jax.assets import TINY_AR
from llada2_jax.config import load_config

HERE = Path(__file__).parent


def get_config():
    ar = load_config(HERE / "tiny_ar.py")
    with ar.unlocked():
        ar.model = {}
    ar.init.checkpoint = str(TINY_AR)
    ar.schedule.ar_tokens = 40_000
    ar.optimizer.learning_rate = 2e-4
    ar.eval.rows = 64
    ar.eval.every_tokens = 0
    ar.checkpoint.every_tokens = 0

    conversion = load_config(HERE / "tiny_wsd.py")
    conversion.schedule.warmup_tokens = 120_000
    conversion.schedule.stable_tokens = 200_000
    conversion.schedule.decay_tokens = 200_000
    conversion.embedding_noise.tokens = 40_000
    conversion.eval.rows = 32
    conversion.eval.every_tokens = 0
    conversion.eval.rate_buckets = 0
    conversion.checkpoint.every_tokens = 25_000

    config = ml_collections.ConfigDict()
    config.workdir = "runs/quickstart"
    config.train_parent = False  # True: train the parent first, and convert that
    config.parent = load_config(HERE / "tiny_ar.py")
    config.ar = ar
    config.conversion = conversion
    config.merge_top_k = 3
    config.report = ml_collections.ConfigDict(
        {
            "eval_rows": 64,
            "eval_samples": 1,
            "block_sizes": (1, 4, 32, 64, 256),
            "exact_rows": 4,
            "prompts": 4,
            "prompt_tokens": 96,
            "max_new_tokens": 96,
            "thresholds": (0.95, 0.9, 0.8, 0.6),
            "rounds": 3,
            "speed_tokens": 512,
        }
    )
    return config.lock()
