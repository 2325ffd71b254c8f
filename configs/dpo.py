"""Preference optimisation (§5.3): from any checkpoint, against any reference.

    llada2 data prepare pairs.jsonl data/pairs --content preference --template llada2 \
        --tokenizer runs/sft/merged
    llada2 train --config=configs/dpo.py --config.init.checkpoint=START
    llada2 merge runs/dpo --metric validation.loss --out runs/dpo/merged

Goes on where configs/sft.py ended (or START, say a step of configs/cap.py), at its last learning
rate, and compares with the model it starts from unless config.reference.checkpoint names another.
beta is the paper's; the number of draws and that they come in antithetic pairs are ours
(docs/posttraining.md measures both). Sizes are those of the quickstart's 4.3M-parameter model.
"""

from llada2_jax.config import default_config


def get_config():
    config = default_config()
    config.workdir = "runs/dpo"
    config.init.checkpoint = "runs/sft/merged"
    config.data.sources = ("data/pairs",)
    config.data.packing = "best_fit"
    config.data.pad_multiple = 32
    config.data.row_length = 512
    config.data.rows_per_step = 16
    config.schedule.dpo_tokens = 1_000_000
    config.schedule.posttrain_block = 32
    config.dpo.beta = 0.1
    config.dpo.samples = 2
    config.dpo.antithetic = True
    config.optimizer.learning_rate_from_start = True
    config.optimizer.warmup_fraction = 0.0
    config.optimizer.decay_fraction = 0.0
    config.optimizer.weight_decay = 0.0
    config.eval.rows = 16
    config.eval.samples = 4
    config.eval.every_tokens = 200_000
    config.checkpoint.every_tokens = 200_000
    return config
