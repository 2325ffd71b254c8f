"""Conversations to SFT to CAP to text, through the commands and the shipped configs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from llada2_jax import cli
from llada2_jax import train as training
from llada2_jax.checkpoint import ModelBundle, save_model
from llada2_jax.hub import load_model
from llada2_jax.metrics import read_metrics
from llada2_jax.model import init_params
from llada2_jax.run_folder import read_starts
from tests.data_helpers import SPECIAL, files, texts, write_jsonl
from tests.helpers import assert_same_params, one_layer

# ml_collections loads config files in a way that Python 3.12 deprecates.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:the load_module\(\) method is deprecated:DeprecationWarning"
)

CONFIGS = Path(__file__).parents[2] / "configs"
VOCAB, ROW, STEPS = 304, 128, 6
STEP = 4 * ROW
ADAPTED = ("attention", "experts", "shared")  # all that the model has
CLOCKS = {"seconds", "tokens_per_second", "input_wait_fraction"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and conversations of two turns prepared for it, some messages weighted."""
    folder = tmp_path_factory.mktemp("posttraining")
    cfg = one_layer(vocab_size=VOCAB, max_position_embeddings=ROW)
    params = init_params(cfg, 0)
    save_model(folder / "model", ModelBundle(cfg, params, SPECIAL, tokenizer_files=files()))
    chats = [
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": text[:9], "weight": [0.5, 1.0][i % 2]},
            {"role": "user", "content": "and"},
            {"role": "assistant", "content": text[-9:]},
        ]
        for i, text in enumerate(texts(80))
    ]
    write_jsonl(folder / "chats.jsonl", [{"messages": chat} for chat in chats])
    run(
        *("data", "prepare", folder / "chats.jsonl", folder / "chats"),
        *("--tokenizer", folder / "model", "--content", "chat", "--template", "llada2"),
        *("--validation-percent", 20, "--processes", 1, "--row-length", ROW),
    )
    return folder


def run(*argv, status=0) -> None:
    assert cli.main([str(word) for word in argv]) == status


def train(folder, recipe, workdir, start, status=0, **fields):
    fields = {
        "init.checkpoint": folder / start,
        "data.sources": repr((str(folder / "chats"),)),
        "data.row_length": ROW,
        "data.rows_per_step": 4,
        "data.pad_multiple": 8,
        f"schedule.{recipe}_tokens": STEPS * STEP,
        "schedule.posttrain_block": 8,
        "eval.rows": 4,
        "checkpoint.every_tokens": 2 * STEP,
        "runtime.dtype": "float32",
        "log_every": 1,
    } | {name.replace("__", "."): value for name, value in fields.items()}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    command = ["train", f"--config={CONFIGS / recipe}.py", f"--workdir={folder / workdir}"]
    run(*command, *overrides, status=status)
    return [
        {k: v for k, v in line.items() if k not in CLOCKS}
        for line in read_metrics(folder / workdir)
    ]


class Killed(Exception):
    pass


def test_conversations_to_sft_to_cap_to_text(folder, monkeypatch, capsys):
    options = {"noise__later_turns": "hide", "noise__edit_rate": 0.2}
    whole = train(folder, "sft", "sft", "model", **options)
    steps = [line for line in whole if line["kind"] == "train"]
    assert len(steps) == STEPS and all(np.isfinite(line["loss"]) for line in steps)
    assert steps[-1]["loss"] < steps[0]["loss"] and "edit_recovery" in steps[0]
    assert {line["phase"] for line in steps} == {"sft"}

    def batches(*args, **kwargs):
        for i, batch in enumerate(given(*args, **kwargs)):
            if i == 3:
                raise Killed
            yield batch

    given = training.batches
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "batches", batches)
        train(folder, "sft", "again", "model", **options)
    resumed = train(folder, "sft", "again", "model", **options)
    assert resumed[-2:] == whole[-2:]

    run("merge", folder / "sft", "--top-k", 2, "--out", folder / "sft" / "merged")
    lines = train(folder, "cap", "cap", "sft/merged", cap__weight=0.5, **options)
    steps = [line for line in lines if line["kind"] == "train"]
    assert all(line["confidence_loss"] >= 0 for line in steps)
    assert {line.get("measured") for line in lines} == {None, "cap:bdlm-8"}
    shutil.copytree(folder / "cap", folder / "cap again")
    shutil.rmtree(folder / "cap again" / "checkpoints" / str(STEPS))
    assert train(folder, "cap", "cap again", "sft/merged", cap__weight=0.5, **options) == lines
    assert [start["step"] for start in read_starts(folder / "cap again")] == [0, STEPS - 2]

    run("merge", folder / "cap", "--top-k", 2, "--out", folder / "cap" / "merged")
    capsys.readouterr()
    run(
        *("generate", "--checkpoint", folder / "cap" / "merged", "--prompt", "q", "--json"),
        *("--max-new-tokens", 8, "--edit-threshold", 0.1, "--edit-budget", 2),
    )
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["tokens"]) <= 8 and answer["edits"] >= 0


def test_adapters_trained_by_cap_are_exported_merged(folder):
    options = {"lora__rank": 2, "lora__modules": repr(ADAPTED), "cap__weight": 0.5}
    lines = train(folder, "cap", "adapters", "model", **options)
    assert all(np.isfinite(m["confidence_loss"]) for m in lines if m["kind"] == "train")
    step = folder / "adapters" / "checkpoints" / str(STEPS)
    run("convert", step, folder / "exported", "--to", "hf")
    exported, merged, base = (
        load_model(path, param_dtype="float32").params
        for path in (folder / "exported", step, folder / "model")
    )
    assert_same_params(exported, merged)
    qkv = (params["moe_layers"]["attention"]["qkv"][...] for params in (merged, base))
    assert (next(qkv) != next(qkv)).any()


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("sft", {"noise__t_min": 0.9}, "need t_min < t_max, got 0.9, 0.8"),
        ("cap", {"cap__weight": -1.0}, "config.cap.weight=-1.0 must not be negative"),
        ("sft", {"schedule__posttrain_block": 16}, "config.data.pad_multiple=8 must be a multiple"),
    ],
)
def test_mistakes_are_named_before_any_step(folder, capsys, recipe, changes, message):
    train(folder, recipe, "refused", "model", status=1, **changes)
    assert message in capsys.readouterr().err
    assert not (folder / "refused").exists()
