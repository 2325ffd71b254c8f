"""What the smallest real training run is made of: a corpus and its tokenizer, or a parent."""

import dataclasses
import random
from pathlib import Path

from llada2_jax.assets import TINY_AR
from llada2_jax.checkpoint import save_model
from llada2_jax.data.documents import split_of
from llada2_jax.data.tokenizer import tokenizer_files, train_tokenizer
from llada2_jax.hub import load_model
from tests.helpers import one_layer, random_params

VOCAB = 272


def write_corpus(folder: Path) -> None:
    """`<folder>/corpus`, with files in both splits, and `<folder>/tokenizer`, trained on it."""
    corpus, rng = folder / "corpus", random.Random(0)
    corpus.mkdir(parents=True)
    names = [f"module_{i}.py" for i in range(2000)]
    chosen = [n for n in names if split_of(n) == "validation"][:4]
    chosen += [n for n in names if split_of(n) == "train"][:30]
    for name in chosen:
        words = [rng.choice(["alpha", "beta", "gamma", "delta"]) for _ in range(8)]
        lines = [f"def {word}(x):\n    return x + {rng.randrange(99)}" for word in words]
        (corpus / name).write_text("\n\n".join(lines) + "\n")
    tokenizer = train_tokenizer((p.read_text() for p in sorted(corpus.iterdir())), VOCAB)
    (folder / "tokenizer").mkdir()
    for name, text in tokenizer_files(tokenizer).items():
        (folder / "tokenizer" / name).write_text(text)


def small_parent(path: Path) -> Path:
    """A random model of one layer with the shipped parent's tokenizer."""
    shipped = load_model(TINY_AR)
    cfg = one_layer(vocab_size=shipped.config.vocab_size, max_position_embeddings=64)
    save_model(path, dataclasses.replace(shipped, config=cfg, params=random_params(cfg, 0, 0.1)))
    return path
