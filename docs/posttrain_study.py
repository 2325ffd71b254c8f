"""What docs/posttrain-study/README.md says beyond the study's own report, from its checkpoints.

    python docs/posttrain_study.py runs/posttrain-study --arms sft cap_0 cap_0_1 cap_0_5 cap_1 cap_2

Prints how many tokens a forward would give if each block took one; and for each arm, seed and
threshold, at blocks of 32, JSON: tokens per forward, tokens per second (meant for a machine that
does nothing else), and of each family how many answers are right, how many are wrong, and how many
of the wrong ones begin with the right one.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from llada2_jax import posttrain
from llada2_jax.config import load_config
from llada2_jax.engine import Engine, tokens_per_second
from llada2_jax.evals.tasks import Task, make_tasks, scores
from llada2_jax.hub import load_model
from llada2_jax.sampler import tokens_per_forward

ROOT = Path(__file__).parents[1]
BLOCK = 32
THRESHOLDS = (0.95, 0.9, 0.8, 0.6)


def ceiling(tasks: Sequence[Task], tokenizer: Tokenizer) -> dict[str, float]:
    """Of right answers, with a forward a block: all of it is accepted, but for the prompt."""

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    prompts = [count(posttrain.prompt_text(task)) for task in tasks]
    answers = [count(task.answer) + 1 for task in tasks]  # with the token that ends it
    blocks = [(p + a - 1) // BLOCK - p // BLOCK + 1 for p, a in zip(prompts, answers, strict=True)]
    accepted = sum(b * BLOCK - p % BLOCK for b, p in zip(blocks, prompts, strict=True))
    return {
        "answer_tokens": sum(answers) / len(tasks),
        "blocks": sum(blocks) / len(tasks),
        "tokens_per_forward": accepted / sum(blocks),
    }


def decoded(engine: Engine, tasks: Sequence[Task], threshold: float, config) -> dict:
    options = {"max_new_tokens": config.decoding.max_new_tokens, "block_size": BLOCK}
    prompts = [posttrain.prompt_text(task) for task in tasks]
    done = engine.generate(prompts, threshold=threshold, **options)
    texts = [(completion.text or "").strip() for completion in done]
    families: dict[str, dict[str, int]] = {}
    for task, text, right in zip(tasks, texts, scores(tasks, texts), strict=True):
        counts = families.setdefault(task.family, {"right": 0, "wrong": 0, "went on": 0})
        counts["right" if right else "wrong"] += 1
        counts["went on"] += not right and text.startswith(task.answer.strip())
    return {
        "tokens_per_forward": tokens_per_forward(*done),
        "tokens_per_second": tokens_per_second(done),
        "families": families,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("study", type=Path)
    p.add_argument("--arms", nargs="+", default=["sft", "cap_0", "cap_1", "cap_2"])
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--thresholds", nargs="+", type=float, default=THRESHOLDS)
    args = p.parse_args()
    config = load_config(ROOT / "configs/posttrain_study.py")
    counts = [config.tasks[split] for split in ("train", "preference", "test")]
    tasks = make_tasks(config.families.to_dict(), counts, config.tasks.seed)[-1]
    tokenizer = ROOT / "llada2_jax/assets/tiny_ar/tokenizer.json"
    print(json.dumps(ceiling(tasks, Tokenizer.from_file(str(tokenizer)))))
    for seed in args.seeds:
        for arm in args.arms:
            steps = (args.study / f"seed{seed}/arms/{arm}/checkpoints").iterdir()
            engine = Engine(
                load_model(max(steps, key=lambda path: int(path.name))),
                max_batch=config.decoding.batch,
            )
            for threshold in args.thresholds:
                found = decoded(engine, tasks, threshold, config)
                row = {"arm": arm, "seed": seed, "threshold": threshold}
                print(json.dumps(row | found), flush=True)


if __name__ == "__main__":
    main()
