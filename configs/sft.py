"""Supervised fine-tuning (§5.1, docs/posttraining.md): of the quickstart's model, mini or flash.

    llada2 data prepare chats.jsonl data/chat --content chat --template llada2 \
        --tokenizer runs/quickstart/merged --row-length 256
    llada2 train --config=configs/sft.py
    llada2 merge runs/sft --out runs/sft/merged

    llada2 plan --config=configs/sft.py:mini --slice=v6e-16
    llada2 train --config=configs/sft.py:mini --config.lora.rank=16    # adapters: a v5litepod-8,
                                                                  # experts at 2 x a balanced load

A mask-ratio bandwidth, complementary pairs and whole packed conversations. The paper prints none of
the numbers; the bandwidth is dFactory's, the rest is ours.
"""

from llada2_jax.config import default_config


def get_config(model="quickstart"):
    """model: "quickstart", "mini" (16B) or "flash" (100B)."""
    config = default_config()
    config.data.sources = ("data/chat",)
    config.data.packing = "best_fit"
    config.data.pad_multiple = 32
    config.schedule.posttrain_block = 32
    config.noise.draw = "bernoulli"
    config.noise.t_min = 0.3
    config.noise.t_max = 0.8
    config.noise.complementary = True
    config.optimizer.weight_decay = 0.05
    config.eval.rate_buckets = 0
    if model == "quickstart":
        _small(config)
    else:
        _large(config, model)
    return config


def _small(config):
    config.workdir = "runs/sft"
    config.init.checkpoint = "runs/quickstart/merged"
    config.data.row_length = 256
    config.data.rows_per_step = 16
    config.schedule.sft_tokens = 400_000
    config.optimizer.learning_rate = 2e-4
    config.eval.rows = 32
    config.checkpoint.every_tokens = 50_000


def _large(config, model):
    config.workdir = f"runs/sft_{model}"
    config.init.checkpoint = f"runs/cpt_{model}/merged"
    config.init.architecture = model
    config.data.row_length = 4096
    config.data.rows_per_step = 64
    config.schedule.sft_tokens = 2 * 10**9
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_fraction = 0.02
    config.runtime.param_dtype = "bfloat16"
    config.runtime.remat = "full"
    config.eval.rows = 128
    config.checkpoint.every_tokens = 200_000_000
