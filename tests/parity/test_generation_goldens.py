"""Generation against the released `generate`: outputs and counts of denoising forwards, fp32.

tests/parity/test_verify.py runs every case in the default way; here are the other ways.
"""

import numpy as np
import pytest

from llada2_jax.hub import load_model
from llada2_jax.sampler import SamplerOptions, generate_tokens
from llada2_jax.types import SpecialTokens

# Of one shape, so that they share a program: a prompt of more than a block, five blocks; without
# and with an early stop, and with an end-of-text token.
CASES = ("gen1", "gen2", "eos1")


@pytest.mark.parametrize(
    "changes",
    # tests/unit/test_sampler.py shows that cached equals uncached, which compiles for longer.
    [{"fuse_commit": True}, pytest.param({"cache": False}, marks=pytest.mark.slow)],
    ids=str,
)
def test_other_ways_of_running_it_give_the_same(shared_goldens, changes):
    folder = shared_goldens / "llada2_tiny"
    goldens = dict(np.load(folder / "goldens.npz"))
    mask, eos = (int(goldens[f"{name}_token_id"]) for name in ("mask", "eos"))
    bundle = load_model(folder, mask_id=mask, eos_id=eos, dtype="float32", param_dtype="float32")
    for case in CASES:
        size, steps, length, threshold, early = goldens[f"{case}/params"].tolist()
        options = SamplerOptions(
            block_size=int(size),
            steps=int(steps),
            max_new_tokens=int(length),
            threshold=threshold,
            early_stop=bool(early),
            **changes,
        )
        stop = int(goldens.get(f"{case}/eos_token_id", eos))
        prompt = goldens[f"{case}/prompt_ids"].tolist()
        special = SpecialTokens(mask, stop, stop)
        generation = generate_tokens(bundle.config, bundle.params, [prompt], special, options)
        assert generation.tokens[0] == goldens[f"{case}/output_ids"].tolist(), case
        assert generation.denoise_forwards[0] == goldens[f"{case}/forward_calls"], case
        assert generation.done.all()
        assert generation.ended_by_eos[0] == case.startswith("eos")
