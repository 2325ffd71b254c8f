"""Continual pretraining of LLaDA2.0-mini (16B): Ling-mini-base-2.0 to block diffusion (§4).

    llada2 plan --config=configs/cpt_mini.py --slice=v6e-64
    llada2 train --config=configs/cpt_mini.py --config.init.checkpoint=FOLDER FLAGS

FLAGS are the last line that `plan` prints. `plan --slice=v6e-8 --config.data.rows_per_step=8`, by
libtpu: 26.5 of 31.2 GiB, experts with room for twice a balanced load. Roofline, not measured: 231k
to 426k tokens/s, links in turn or all overlapped. Other slices: docs/plan.md.

From the paper (arXiv 2512.15745): block sizes 1 -> 4 -> 32 -> 64 -> 4096 -> 2048 -> ... -> 32, rows
of 4096 tokens, documents that do not see each other, noise on the mask's embedding in the first
steps (§7.1), the mean of the best checkpoints (§4.3, `llada2 merge`). Not published, and ours:
tokens of each stage, rows a step, the learning rate and its schedule, weight decay, the noise's
size and length, how mask rates are drawn. bf16 parameters are rounded stochastically. Experts are
not balanced, on which the paper is silent; Ling's pretraining moved their bias by 1e-3 a step:
--config.optimizer.expert_bias_rate=1e-3.
"""

from llada2_jax.config import default_config

BILLION = 10**9


def get_config():
    config = default_config()
    config.workdir = "runs/cpt_mini"
    config.init.checkpoint = "checkpoints/Ling-mini-base-2.0"
    config.init.architecture = "mini"
    config.data.sources = ("data/cpt",)  # from `llada2 data prepare`
    config.data.row_length = 4096
    config.data.rows_per_step = 64
    config.schedule.warmup_blocks = (1, 4, 32, 64)
    config.schedule.warmup_tokens = 4 * BILLION
    config.schedule.stable_tokens = 40 * BILLION
    config.schedule.decay_blocks = (2048, 1024, 512, 256, 128, 64, 32)
    config.schedule.decay_tokens = 6 * BILLION
    config.embedding_noise.sigma = 0.01
    config.embedding_noise.tokens = 100_000_000
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_fraction = 0.02
    config.optimizer.decay_fraction = 0.12  # with the block sizes
    config.optimizer.final_fraction = 0.1
    config.runtime.param_dtype = "bfloat16"
    config.runtime.remat = "full"
    config.eval.rows = 256
    config.eval.every_tokens = BILLION
    config.eval.target_block_size = 32
    config.checkpoint.every_tokens = BILLION
    config.spikes.loss = "skip"
    return config
