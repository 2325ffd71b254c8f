"""The quickstart's own parts; tests/e2e/test_quickstart.py runs the whole."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

import llada2_jax.starting_model
from llada2_jax import checkpoint, quickstart
from llada2_jax.config import ConfigError, load_config, model_dict
from llada2_jax.data.corpus import Corpus, Source
from llada2_jax.data.documents import split_of
from llada2_jax.data.packing import TokenizedDocuments
from llada2_jax.data.tokenizer import train_tokenizer
from llada2_jax.engine import Completion, Trajectory, tokens_per_second
from llada2_jax.hub import load_bundle
from llada2_jax.starting_model import starting_bundle
from llada2_jax.types import SpecialTokens
from tests.helpers import config as tiny
from tests.helpers import random_params

CONFIGS = Path(__file__).parents[2] / "configs"
HELD_OUT = [f"m{i}.py" for i in range(1000) if split_of(f"m{i}.py") == "validation"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x\n"], 270)


def completion(tokens, *, accepted, denoise, commits, seconds, trajectory=None) -> Completion:
    return Completion(
        text="",
        tokens=tokens,
        prompt_tokens=[1],
        finish_reason="length",
        denoise_forwards=denoise,
        commit_forwards=commits,
        commits=commits,
        accepted=accepted,
        edits=0,
        seconds=seconds,
        compile_seconds=9.0,
        trajectory=trajectory,
    )


# ------------------------------------------------------------------------------------- prompts


def source(length: int, name: str) -> str:
    """A function too near the beginning, then one called `name`, and more text."""
    return "def early():\n" + "#" * length + f"\ndef {name}(x):\n" + "    x += 1\n" * (length // 8)


def prompts_of(folder, tokenizer, count, prompt_tokens=12, new_tokens=8):
    found = quickstart.held_out_prompts(str(folder), tokenizer, count, prompt_tokens, new_tokens)
    return [(name, tokenizer.decode(ids), len(ids)) for name, ids in found]


def test_prompts_end_with_a_function_of_a_held_out_file(tmp_path, tokenizer):
    names = [*HELD_OUT[:5], "m0.py", "m1.py"]
    assert {split_of(name) for name in names[5:]} == {"train"}
    for name in names:
        (tmp_path / name).write_text(source(300, f"f_{name[:-3]}"))
    found = prompts_of(tmp_path, tokenizer, 99)
    assert [name for name, *_ in found] == sorted(HELD_OUT[:5])
    for name, text, length in found:
        assert f"def f_{name[:-3]}(x):".endswith(text[-6:]) and text.endswith("(x):")
        assert length == 12  # the end of what comes before, as much as was asked for
    whole = prompts_of(tmp_path, tokenizer, 1, prompt_tokens=1000)[0][1]
    assert whole == source(300, f"f_{found[0][0][:-3]}").partition("    x += 1")[0].rstrip("\n")


def test_prompts_are_spread_over_the_files_in_order(tmp_path, tokenizer):
    for name in HELD_OUT[:5]:
        (tmp_path / name).write_text(source(300, "f"))
    names = sorted(HELD_OUT[:5])
    found = [name for name, *_ in prompts_of(tmp_path, tokenizer, 3)]
    assert found == [names[0], names[2], names[4]]


def test_files_without_a_function_or_without_more_text_give_no_prompt(tmp_path, tokenizer):
    (tmp_path / HELD_OUT[0]).write_text("x = 1\n" * 100)
    (tmp_path / HELD_OUT[1]).write_text("#" * 300 + "\ndef f(x):\n    pass\n")
    (tmp_path / HELD_OUT[2]).write_text("#" * 300 + "\ndef f(x)")
    (tmp_path / HELD_OUT[3]).write_text(source(300, "f"))
    assert [name for name, *_ in prompts_of(tmp_path, tokenizer, 9)] == [HELD_OUT[3]]


def test_a_source_without_functions_is_an_error(tmp_path, tokenizer):
    (tmp_path / HELD_OUT[0]).write_text("x = 1\n" * 100)
    with pytest.raises(ConfigError, match="none of its 1 validation files has a function to compl"):
        prompts_of(tmp_path, tokenizer, 9)
    with pytest.raises(ConfigError, match="neither 'stdlib' nor a folder"):
        prompts_of(tmp_path / "nowhere", tokenizer, 9)


# -------------------------------------------------------------------------------------- config

WRONG = {
    "report.eval_rows": (60, r"report\.eval_rows=60 must be a multiple of 16"),
    "report.eval_samples": (0, r"report\.eval_samples=0 must be at least 1"),
    "report.block_sizes": ((1, 5), r"block_sizes=\(1, 5\) must be divisors of config\.conversion"),
    "report.exact_rows": (65, r"exact_rows=65 must be at most config\.report\.eval_rows"),
    "report.prompts": (0, r"report\.prompts=0 must be at least 1"),
    "report.prompt_tokens": (4001, r"max_new_tokens=96 must be with prompt_tokens=4001 within the"),
    "report.thresholds": ((0.9, 2.0), r"thresholds=\(0\.9, 2\.0\) must be from 0 to 1"),
    "report.rounds": (0, r"report\.rounds=0 must be at least 1"),
    "report.speed_tokens": (
        4065,
        r"speed_tokens=4065 must be with a prompt of 32 within the model",
    ),
    "merge_top_k": (99, r"config\.merge_top_k=99: .* saves 5 checkpoints and keeps the 4 best"),
    "conversion.optimizer.b2": (2.0, r"config\.optimizer\.b2=2\.0 must be"),
    "ar.data.source": ("elsewhere", r"config\.ar\.data: both stages read the one corpus"),
    "conversion.data.source": ("nowhere", "'nowhere' is neither 'stdlib' nor a folder"),
}


@pytest.mark.parametrize("field", WRONG)
def test_what_is_measured_is_checked_before_anything_is_trained(field, monkeypatch):
    value, message = WRONG[field]
    config = load_config(CONFIGS / "quickstart.py")
    config.update_from_flattened_dict({field: value})
    if field == "conversion.data.source":
        config.ar.data.source = value
    for stage in ("train", "load_corpus", "_train_parent"):
        monkeypatch.setattr(quickstart, stage, lambda *a, **k: pytest.fail("too late"))
    with pytest.raises(ConfigError, match=message):
        quickstart.run(config)


# ------------------------------------------------------------------------------------- figures


def test_rates_are_of_all_completions_together():
    done = [
        completion([3] * 10, accepted=12, denoise=6, commits=2, seconds=1.5),
        completion([3] * 20, accepted=24, denoise=6, commits=4, seconds=0.5),
    ]
    assert quickstart._tokens_per_forward(done) == {
        "tokens_per_forward": 36 / 12,
        "tokens_per_forward_with_commits": 36 / 18,
    }
    # What was asked for, not what was decoded beyond it.
    assert tokens_per_second(done) == 30 / 2.0


def test_a_trajectory_keeps_special_tokens_in_sight(tokenizer):
    record = Trajectory(np.asarray([1, 0, 2]), np.asarray([0.5, 1.0, 0.75], np.float32))
    done = completion([70, 71, 1], accepted=3, denoise=3, commits=0, seconds=1, trajectory=record)
    shown = quickstart._trajectory(done, tokenizer, 0.8)
    assert shown["tokens"][2] == "<|endoftext|>" and len(shown["tokens"]) == 3
    assert shown["accepted_at"] == [1, 0, 2] and shown["confidence"] == [0.5, 1.0, 0.75]
    assert shown["threshold"] == 0.8


def test_the_corpus_is_counted_in_documents_tokens_and_bytes():
    train = TokenizedDocuments(
        np.asarray([2, 5, 5, 1, 2, 6, 1]), np.arange(2), np.asarray([0, 4, 7])
    )
    held_out = TokenizedDocuments(np.asarray([2, 6, 1]), np.arange(1), np.asarray([0, 3]))
    sizes = np.asarray([0, 0, 0, 1, 1, 3, 10], np.int32)
    special = SpecialTokens(mask=0, eos=1, pad=1, bos=2)
    counted = quickstart._describe_corpus(Corpus((Source("a", train, held_out),), sizes, special))
    assert counted == {
        "train": {"documents": 2, "tokens": 7, "bytes": 16},
        "validation": {"documents": 1, "tokens": 3, "bytes": 10},
    }


# -------------------------------------------------------------------------------------- parent


def test_the_parent_is_trained_once_and_shipped(tmp_path, monkeypatch):
    """The long run's first stage, whose checkpoint is what the package holds a copy of."""
    folder, shipped, trained = tmp_path / "source", tmp_path / "shipped", []
    folder.mkdir()
    (folder / "m0.py").write_text("def f(x):\n    return x\n" * 8)
    (folder / HELD_OUT[0]).write_text("unseen " * 200)
    config = load_config(CONFIGS / "quickstart_long.py")
    model = model_dict(tiny(vocab_size=270))
    with config.unlocked():
        config.parent.model = {k: v for k, v in model.items() if v is not None}
    config.parent.data.source = str(folder)

    def train(cfg):
        trained.append(cfg)
        target = Path(cfg.workdir) / "checkpoints" / str(cfg.total_steps)
        checkpoint.save_model(target, starting_bundle(cfg))

    config.conversion.init.checkpoint = str(shipped)
    monkeypatch.setattr(quickstart, "train", train)
    monkeypatch.setattr(
        llada2_jax.starting_model, "init_params", lambda cfg, seed, mesh: random_params(cfg, seed)
    )
    with monkeypatch.context() as stopped:  # between two files of the tokenizer
        unwritable = {"tokenizer.json": "{}", "tokenizer_config.json": None}
        stopped.setattr(quickstart, "tokenizer_files", lambda tokenizer: unwritable)
        with pytest.raises(TypeError):
            quickstart._train_parent(config, tmp_path / "run")
    assert not trained
    quickstart._train_parent(config, tmp_path / "run")
    assert [cfg.workdir for cfg in trained] == [str(tmp_path / "run" / "parent")]
    bundle = load_bundle(shipped)
    assert bundle.config.vocab_size == 270 and bundle.special.mask == 0
    vocabulary = Tokenizer.from_str(bundle.tokenizer_files["tokenizer.json"]).get_vocab()
    assert "de" in vocabulary and "un" not in vocabulary  # the held-out file taught nothing
    with safe_open(shipped / "model.safetensors", "numpy") as file:
        assert file.get_slice("lm_head.weight").get_dtype() == "BF16"  # what fits into a package
    weights = (shipped / "model.safetensors").read_bytes()
    # A run that was stopped between the last step and shipping ships the same, and trains nothing.
    shutil.rmtree(shipped)
    quickstart._train_parent(config, tmp_path / "run")
    assert (shipped / "model.safetensors").read_bytes() == weights and len(trained) == 1
