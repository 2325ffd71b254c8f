"""Small models and rows that tests share."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np

from llada2_jax import checkpoint, cli
from llada2_jax.model import build
from llada2_jax.types import Batch, ModelConfig

TINY = ModelConfig(
    vocab_size=16,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=16,
    moe_intermediate_size=8,
    num_experts=4,
    experts_per_token=2,
    n_group=2,
    topk_group=1,
    initializer_range=0.3,
    dtype="float32",
)
# Quicker to compile: for what neither a second layer nor a dense one has a part in.
ONE_LAYER = dataclasses.replace(TINY, num_layers=1, first_k_dense_replace=0)


def make_batch(tokens, segments=None, *, document_ids=None, loss_mask=None) -> Batch:
    """Rows with the coordinates that packing would give them; segment s is document s unless
    document_ids says otherwise."""
    tokens = np.asarray(tokens, np.int32)
    segments = np.ones_like(tokens) if segments is None else np.asarray(segments, np.int32)
    positions = np.zeros_like(tokens)
    for r, row in enumerate(segments):
        for i in range(1, len(row)):
            positions[r, i] = positions[r, i - 1] + 1 if row[i] == row[i - 1] else 0
    return Batch(
        tokens=jnp.asarray(tokens),
        segment_ids=jnp.asarray(segments),
        positions=jnp.asarray(positions),
        loss_mask=jnp.asarray(
            np.ones_like(tokens, bool) if loss_mask is None else np.asarray(loss_mask, bool)
        ),
        document_ids=jnp.asarray(
            segments if document_ids is None else np.asarray(document_ids, np.int32)
        ),
        document_positions=jnp.asarray(positions),
        visits=jnp.zeros_like(jnp.asarray(tokens)),
    )


def make_pairs(pairs, row_length=None) -> Batch:
    """A row a list of pairs: (pair id, chosen, rejected, prompt), the texts as ids, of which the
    first `prompt` are not supervised. The reference's bounds are 0."""
    length = row_length or max(sum(len(c) + len(r) for _, c, r, _ in row) for row in pairs)
    tokens, segments, ids, loss, preference = (np.zeros((len(pairs), length), int) for _ in "tsilp")
    for number, row in enumerate(pairs):
        at = segment = 0
        for pair, chosen, rejected, prompt in row:
            for text, side in ((chosen, 1), (rejected, -1)):
                span, segment = slice(at, at + len(text)), segment + 1
                tokens[number, span], segments[number, span] = text, segment
                ids[number, span], preference[number, span] = pair, side
                loss[number, at + prompt : at + len(text)] = 1
                at += len(text)
    batch = make_batch(tokens, segments, document_ids=ids, loss_mask=loss)
    return dataclasses.replace(
        batch,
        preference=jnp.asarray(preference, jnp.int32),
        reference=jnp.zeros(tokens.shape, jnp.float32),
    )


def exit_status(*argv) -> int:
    """What `llada2 *argv` ends with, argparse's way to end included."""
    try:
        return cli.main([str(part) for part in argv])
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


class Terminal(io.StringIO):
    """A stand-in for sys.stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def config(**changes) -> ModelConfig:
    return dataclasses.replace(TINY, **changes)


def one_layer(**changes) -> ModelConfig:
    return dataclasses.replace(ONE_LAYER, **changes)


def random_params(cfg: ModelConfig, seed: int, scale: float = 1.0):
    """Normal numbers everywhere, where compiling an initialiser is not worth it."""
    rng, abstract = np.random.default_rng(seed), build(cfg)[1]
    leaves = {
        path: (scale * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
        for path, leaf in checkpoint.flatten(abstract).items()
    }
    return checkpoint.fill_params(abstract, leaves)


def assert_same_params(a, b) -> None:
    """Bitwise equality, dtypes included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
