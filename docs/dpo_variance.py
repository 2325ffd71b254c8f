"""How noisy DPO's estimate of a margin is, by the number of draws and how they are drawn.

    python docs/dpo_variance.py POLICY REFERENCE

POLICY and REFERENCE are checkpoints of models that are close to each other, as they are during DPO.
Prints the tables of docs/posttraining.md. A pair is two stretches of Python that follow the same
prompt, one truly and one from another file.
"""

import argparse
import itertools

import numpy as np
from tqdm import tqdm

from llada2_jax.config import DPOConfig, NoiseConfig, TrainConfig
from llada2_jax.data.documents import documents
from llada2_jax.data.packing import tokenize
from llada2_jax.evals.likelihood import tokenizer_of
from llada2_jax.hub import load_model
from llada2_jax.reference import make_reference_step
from llada2_jax.train_step import make_context
from llada2_jax.types import Batch

PROMPT, ANSWER, BLOCK = 32, 64, 32
FORWARDS = (1, 2, 4, 8)  # a text, of each model
# name -> noise, forwards a draw
DRAWS = {
    "independent": ({}, 1),
    "antithetic": ({"samples": 2, "antithetic": True}, 2),
    "complementary": ({}, 2),
}


def pairs_of(bundle, count: int) -> Batch:
    """A pair a row: both texts open with the same prompt."""
    tokenizer = tokenizer_of(bundle)
    tokenized = tokenize(
        documents("stdlib", "validation"), tokenizer, eos=bundle.special.eos, bos=None
    )
    size = PROMPT + ANSWER
    starts = [
        start
        for first, end in itertools.pairwise(tokenized.offsets)
        for start in range(first, end - size, 8 * size)
    ]
    starts = np.random.default_rng(0).permutation(starts)[: 2 * count]
    texts = np.stack([tokenized.tokens[start : start + size] for start in starts])
    chosen, other = texts[:count], texts[count:]
    rejected = np.concatenate([chosen[:, :PROMPT], other[:, PROMPT:]], axis=1)
    tokens = np.concatenate([chosen, rejected], axis=1).astype(np.int32)

    def row(first, second) -> np.ndarray:
        whole = np.concatenate([np.broadcast_to(first, size), np.broadcast_to(second, size)])
        return np.tile(whole, (count, 1)).astype(np.int32)

    places = np.arange(size)
    return Batch(
        tokens=tokens,
        segment_ids=row(1, 2),
        positions=row(places, places),
        loss_mask=row(places >= PROMPT, places >= PROMPT).astype(bool),
        document_ids=np.repeat(np.arange(count, dtype=np.int32)[:, None], 2 * size, axis=1),
        document_positions=row(places, places),
        visits=row(0, 0),
        preference=row(1, -1),
    )


def bounds(model, batch: Batch, how: str, draws: int) -> np.ndarray:
    """Bounds on both texts of each pair in every draw: fp64 [draws, pairs, 2]."""
    cfg = TrainConfig(
        noise=NoiseConfig(complementary=how == "complementary"), dpo=DPOConfig(**DRAWS[how][0])
    )
    step, found = make_reference_step(model.config), []
    for draw in tqdm(range(draws), desc=how, disable=None):
        context = make_context(cfg, BLOCK, model.special.mask, draw=draw)
        shares = np.asarray(step(model.params, batch, context), np.float64)
        found.append(shares.reshape(len(shares), 2, -1).sum(-1))
    return np.stack(found)


def spread(draws: np.ndarray, size: int) -> float:
    """Standard deviation of means of `size` draws [draws, pairs], root mean square over pairs."""
    whole = draws[: len(draws) // size * size]
    means = whole.reshape(-1, size, draws.shape[1]).mean(1)
    return float(np.sqrt(means.var(0, ddof=1).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("policy")
    parser.add_argument("reference")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--draws", type=int, default=128)
    args = parser.parse_args()
    policy, reference = (load_model(path) for path in (args.policy, args.reference))
    batch = pairs_of(policy, args.pairs)
    found = {
        how: [bounds(model, batch, how, args.draws) for model in (policy, reference)]
        for how in DRAWS
    }

    theta, ref = found["independent"]
    gain = theta - ref
    margin = (gain[..., 0] - gain[..., 1]).mean(0)
    print(f"margin / beta, nats: rms over pairs {np.sqrt((margin**2).mean()):.2f}\n")
    print("| what one draw gives | standard deviation, nats |\n|---|---|")
    apart = theta - np.roll(ref, 1, axis=0)
    rows = {
        "B(chosen)": theta[..., 0],
        "B(chosen) − B_ref(chosen), noise of their own": apart[..., 0],
        "B(chosen) − B_ref(chosen), shared noise": gain[..., 0],
        "margin / β, models with noise of their own": apart[..., 0] - apart[..., 1],
        "margin / β, texts with noise of their own": gain[..., 0]
        - np.roll(gain[..., 1], 1, axis=0),
        "margin / β, all shared": gain[..., 0] - gain[..., 1],
    }
    for name, draws in rows.items():
        print(f"| {name} | {spread(draws, 1):.2f} |")
    print(f"\n| forwards a text | {' | '.join(DRAWS)} |\n|---|{'---|' * len(DRAWS)}")
    for forwards in FORWARDS:
        cells = []
        for how, (theta, ref) in found.items():
            gain, each = theta - ref, DRAWS[how][1]
            size = forwards // each
            enough = size and len(gain) >= 4 * size  # means to take a deviation of
            cells.append(f"{spread(gain[..., 0] - gain[..., 1], size):.2f}" if enough else "")
        print(f"| {forwards} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
