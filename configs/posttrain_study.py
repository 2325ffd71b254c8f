"""`make posttrain-study`: the comparisons of the paper's post-training section in small.

    llada2 posttrain --config=configs/posttrain_study.py     # hours on two CPU cores; resumable

Three seeds; complementary masking on and off, bandwidth on and off, CAP's weight, models trained at
other block sizes, DPO with and without CAP before it, all decoded at every pair of threshold and
block size.
"""

from pathlib import Path

from llada2_jax.config import load_config

WEIGHTS = (0.0, 0.1, 0.5, 1.0, 2.0)
BLOCKS = (16, 32, 64)


def get_config():
    config = load_config(Path(__file__).parent / "posttrain.py")
    with config.unlocked():
        config.workdir = "runs/posttrain-study"
        config.seeds = (0, 1, 2)
        config.tasks.train, config.tasks.test = 5000, 100
        config.decoding.every_pair = True
        config.stages.sft.schedule.sft_tokens = 300_000
        config.stages.cap.schedule.cap_tokens = 100_000
        config.arms = {
            "sft": _arm("sft", "base"),
            **_noise(),
            **_blocks(),
            **_weights(),
            "dpo": _arm("dpo", "sft"),
            "cap_dpo": _arm("dpo", "cap_2"),
        }
        config.comparisons = {
            "stages": ("sft", "cap_0", "cap_2", "dpo", "cap_dpo"),
            "complementary_masking": ("sft", "single_masks"),
            "bandwidth": ("sft", "all_rates"),
            "cap_weight": tuple(_weights()),
            "trained_block_size": ("sft", *_blocks()),
        }
    return config.lock()


def _arm(stage: str, start: str, **changes):
    return {"stage": stage, "start": start, "changes": changes}


def _noise():
    return {
        "single_masks": _arm("sft", "base", noise={"complementary": False}),
        "all_rates": _arm("sft", "base", noise={"draw": "count", "t_min": 1e-3, "t_max": 1.0}),
    }


def _weights():
    names = [f"cap_{weight:g}".replace(".", "_") for weight in WEIGHTS]
    pairs = zip(names, WEIGHTS, strict=True)
    return {name: _arm("cap", "sft", cap={"weight": weight}) for name, weight in pairs}


def _blocks():
    def arm(size: int):
        data = {"pad_multiple": max(32, size)}
        return _arm("sft", "base", schedule={"posttrain_block": size}, data=data)

    return {f"block_{size}": arm(size) for size in BLOCKS if size != 32}
