"""Preference optimisation (§5.3): from any checkpoint, against any reference.

    llada2 data prepare pairs.jsonl data/pairs --content preference --template llada2 \
        --tokenizer runs/sft/merged
    llada2 train --config=configs/dpo.py --config.init.checkpoint=START
    llada2 merge runs/dpo --metric validation.loss --out runs/dpo/merged

    llada2 train --config=configs/dpo.py:mini                  # or flash

Goes on where configs/sft.py ended (or START, say a step of configs/cap.py), at its last learning
rate, and compares with the model it starts from unless config.reference.checkpoint names another.
beta is the paper's; the number of draws and that they come in antithetic pairs are ours
(docs/posttraining.md measures both).
"""

from pathlib import Path

from llada2_jax.config import default_config, load_config


def get_config(model="quickstart"):
    """model: "quickstart", "mini" (16B) or "flash" (100B)."""
    config = load_config(Path(__file__).parent / "sft.py", model)
    config.init.checkpoint = f"{config.workdir}/merged"
    config.workdir = config.workdir.replace("sft", "dpo")
    config.data.sources = ("data/pairs",)
    config.schedule.sft_tokens = 0
    unset = default_config()
    config.noise = unset.noise  # dpo draws its own
    config.dpo.beta = 0.1
    config.dpo.samples = 2
    config.dpo.antithetic = True
    config.optimizer.learning_rate = unset.optimizer.learning_rate
    config.optimizer.learning_rate_from_start = True
    config.optimizer.warmup_fraction = 0.0
    config.optimizer.decay_fraction = 0.0
    config.optimizer.weight_decay = 0.0
    config.eval.samples = 4
    if model == "quickstart":
        config.data.row_length = 512  # a pair stays whole
        config.schedule.dpo_tokens = 1_000_000
        config.eval.rows = 16
        config.eval.every_tokens = config.checkpoint.every_tokens = 200_000
    else:
        config.schedule.dpo_tokens = 500_000_000
        config.eval.rows = 64
        config.eval.every_tokens = config.checkpoint.every_tokens = 50_000_000
    return config
