"""The quickstart's autoregressive parent, from scratch: 4.3M parameters on the standard library.

    llada2 train --config=configs/tiny_ar.py --config.data.tokenizer=FOLDER

A LLaDA2-architecture mixture of experts (dense first layer, shared expert, group-limited sigmoid
router, q/k norm, partial rotary embedding), small enough to train on two CPU cores.
`make quickstart-long` runs this as its first stage; what it gave is in docs/quickstart-long/.
"""

from llada2_jax.config import default_config


def get_config():
    config = default_config()
    config.workdir = "runs/tiny_ar"
    with config.unlocked():
        config.model = {
            "vocab_size": 2048,
            "hidden_size": 192,
            "num_layers": 5,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 64,
            "intermediate_size": 512,
            "moe_intermediate_size": 64,
            "num_experts": 16,
            "experts_per_token": 4,
            "n_group": 4,
            "topk_group": 2,
            "max_position_embeddings": 4096,
            "rope_theta": 10_000.0,
        }
    config.data.row_length = 256
    config.data.rows_per_step = 16
    config.schedule.ar_tokens = 12_000_000
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.decay_fraction = 0.3
    config.optimizer.final_fraction = 0.05
    config.optimizer.expert_bias_rate = 1e-3  # as Ling was pretrained; kept while it is converted
    config.eval.rows = 128
    config.eval.every_tokens = 1_000_000
    config.checkpoint.every_tokens = 1_000_000
    return config
