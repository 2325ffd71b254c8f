"""Supervised fine-tuning of the quickstart's model (§5.1, docs/posttraining.md).

    llada2 data prepare chats.jsonl data/chat --content chat --template llada2 \
        --tokenizer runs/quickstart/merged --row-length 256
    llada2 train --config=configs/sft.py
    llada2 merge runs/sft --out runs/sft/merged

A mask-ratio bandwidth, complementary pairs and whole packed conversations. The paper prints none of
the numbers; the bandwidth is dFactory's, the rest is ours. For another model set init.checkpoint,
data.row_length and the learning rate.
"""

from llada2_jax.config import default_config


def get_config():
    config = default_config()
    config.workdir = "runs/sft"
    config.init.checkpoint = "runs/quickstart/merged"
    config.data.sources = ("data/chat",)
    config.data.packing = "best_fit"
    config.data.pad_multiple = 32
    config.data.row_length = 256
    config.data.rows_per_step = 16
    config.schedule.sft_tokens = 400_000
    config.schedule.posttrain_block = 32
    config.noise.draw = "bernoulli"
    config.noise.t_min = 0.3
    config.noise.t_max = 0.8
    config.noise.complementary = True
    config.optimizer.learning_rate = 2e-4
    config.optimizer.weight_decay = 0.05
    config.eval.rows = 32
    config.eval.rate_buckets = 0
    config.checkpoint.every_tokens = 50_000
    return config
