"""Generation against the released `generate`: outputs and counts of denoising forwards, fp32."""

from pathlib import Path

import numpy as np
import pytest

from llada2_jax.hub import load_model
from llada2_jax.sampler import Generation, SamplerOptions, generate_tokens
from llada2_jax.types import SpecialTokens

CASES = [f"gen{i}" for i in range(8)] + [f"eos{i}" for i in (1, 3, 4, 6)]


@pytest.fixture(scope="module")
def load():
    """Loads a golden folder once: (bundle, goldens)."""
    loaded = {}

    def get(folder: Path):
        if folder not in loaded:
            goldens = dict(np.load(folder / "goldens.npz"))
            ids = {name: int(goldens[f"{name}_token_id"]) for name in ("mask", "eos")}
            bundle = load_model(
                folder,
                mask_id=ids["mask"],
                eos_id=ids["eos"],
                dtype="float32",
                param_dtype="float32",
            )
            loaded[folder] = bundle, goldens
        return loaded[folder]

    return get


def run(bundle, goldens, case: str, **changes) -> Generation:
    size, steps, length, threshold, early = goldens[f"{case}/params"].tolist()
    options = {
        "block_size": int(size),
        "steps": int(steps),
        "max_new_tokens": int(length),
        "threshold": threshold,
        "early_stop": bool(early),
    }
    eos = int(goldens.get(f"{case}/eos_token_id", bundle.special.eos))
    special = SpecialTokens(bundle.special.mask, eos, eos)
    prompt = goldens[f"{case}/prompt_ids"].tolist()
    options = SamplerOptions(**(options | changes))
    return generate_tokens(bundle.config, bundle.params, [prompt], special, options)


def check(generation: Generation, goldens, case: str) -> None:
    assert generation.tokens[0] == goldens[f"{case}/output_ids"].tolist()
    assert generation.denoise_forwards[0] == goldens[f"{case}/forward_calls"]
    assert generation.done.all()
    assert generation.ended_by_eos[0] == case.startswith("eos")


@pytest.mark.parametrize("case", CASES)
def test_equals_the_released_generate(golden_checkpoint, load, case):
    bundle, goldens = load(golden_checkpoint)
    check(run(bundle, goldens, case), goldens, case)


@pytest.mark.parametrize("changes", [{"fuse_commit": True}, {"cache": False}], ids=str)
@pytest.mark.parametrize("case", ["gen2", "eos3", "eos4"])
def test_other_ways_of_running_it_give_the_same(shared_goldens, load, case, changes):
    bundle, goldens = load(shared_goldens / "llada2_tiny")
    check(run(bundle, goldens, case, **changes), goldens, case)
