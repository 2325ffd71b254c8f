"""`llada2 data prepare`, then `llada2 train` from what it wrote: the same rows, stopped or not."""

import contextlib
import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from llada2_jax import cli
from llada2_jax import train as training
from llada2_jax.config import ConfigError, default_config, model_dict
from llada2_jax.config_check import validate
from llada2_jax.data.corpus import load_corpus
from llada2_jax.data.loader import batches
from llada2_jax.metrics import read_metrics
from llada2_jax.train import train
from tests.data_helpers import SPECIAL, files, texts, write_jsonl
from tests.helpers import one_layer

VOCAB, ROW, STEPS = 304, 64, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared by the command: web (JSONL), code (a tree), chats, and pairs."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "tokenizer").mkdir()
    for name, text in files().items():
        (folder / "tokenizer" / name).write_text(text)
    write_jsonl(folder / "web.jsonl.gz", [{"body": " ".join([t] * 4)} for t in texts(60)])
    (folder / "code").mkdir()
    for i, text in enumerate(texts(40)):
        (folder / "code" / f"{i}.py").write_text(text * 5, encoding="utf-8")
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    chats = [{"messages": [said[0], said[1] | {"content": t}]} for t in texts(60)]
    write_jsonl(folder / "chats.jsonl", chats)
    pairs = [{"prompt": "q", "chosen": t, "rejected": t[::-1]} for t in texts(30)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    prepare(folder, "web.jsonl.gz", "--field", "body")
    prepare(folder, "code")
    prepare(folder, "chats.jsonl", "--content", "chat", "--template", "llada2")
    prepare(folder, "pairs.jsonl", "--content", "preference", "--template", "llada2")
    return folder


def prepare(folder, source, *options):
    output = folder / "prepared" / source.split(".")[0]
    arguments = [str(folder / source), str(output), "--tokenizer", str(folder / "tokenizer")]
    more = ["--validation-percent", "20", "--processes", "1", *options]
    assert cli.main(["data", "prepare", *arguments, *more]) == 0


def config_of(folder, workdir, *sources, **data):
    config = default_config()
    config.workdir = str(workdir)
    with config.unlocked():
        config.model = {
            k: v for k, v in model_dict(one_layer(vocab_size=VOCAB)).items() if v is not None
        }
    config.data.tokenizer = str(folder / "tokenizer")
    config.data.sources = tuple(str(folder / "prepared" / s) for s in sources)
    config.data.row_length = ROW
    config.data.rows_per_step = 4
    for name, value in data.items():
        config.data[name] = value
    config.schedule.decay_blocks = (4,)
    config.schedule.decay_tokens = STEPS * 4 * ROW
    config.eval.rows = 4
    config.eval.rate_buckets = 0
    config.checkpoint.every_tokens = 2 * 4 * ROW
    config.runtime.dtype = "float32"
    config.log_every = 1
    return config


class Stopped(Exception):
    pass


def stop_after(monkeypatch, steps):
    """The next run gets `steps` batches and no more; returns what they held, as it goes."""
    seen, whole = [], training.batches

    def some(*args, **kwargs):
        for i, batch in enumerate(whole(*args, **kwargs)):
            if i == steps:
                raise Stopped
            seen.append((batch.document_ids, batch.document_positions, batch.visits))
            yield batch

    monkeypatch.setattr(training, "batches", some)
    return seen


def test_prepare_says_what_it_did(folder, capsys):
    prepare(folder, "code")  # there already: nothing to do
    printed = capsys.readouterr().out
    assert "40 rows read, 0 bad" in printed and "train" in printed and "tokens" in printed
    manifest = json.loads((folder / "prepared" / "web" / "manifest.json").read_text())
    assert manifest["rows"] == {"read": 60, "bad": {}}


def test_a_stopped_run_reads_on_where_it_was(folder, tmp_path, monkeypatch):
    config = validate(config_of(folder, tmp_path / "run", "web", "code", weights=(3.0, 1.0)))
    lineage = []
    # A checkpoint every second step: what the third one saw is seen again.
    for steps, kept in ((3, 2), (STEPS, STEPS)):
        with monkeypatch.context() as patch:
            seen = stop_after(patch, steps)
            with pytest.raises(Stopped) if steps < STEPS else contextlib.nullcontext():
                train(config)
        lineage += seen[:kept]
    tokenizer = Tokenizer.from_str(files()["tokenizer.json"])
    rows = load_corpus(config.data, tokenizer, SPECIAL).training_rows(
        config.data, STEPS * config.data.rows_per_step, config.seed
    )
    whole = list(batches(rows, rows_per_step=config.data.rows_per_step, first_step=0))
    assert len(lineage) == len(whole) == STEPS
    for (ids, positions, visits), batch in zip(lineage, whole, strict=True):
        np.testing.assert_array_equal(ids, batch.document_ids)
        np.testing.assert_array_equal(positions, batch.document_positions)
        np.testing.assert_array_equal(visits, batch.visits)
    losses = [m["loss"] for m in read_metrics(tmp_path / "run", "train")]
    assert len(losses) == STEPS and np.isfinite(losses).all()


def test_chats_train_in_whole_documents(folder, tmp_path):
    config = config_of(
        folder,
        tmp_path / "run",
        "chats",
        packing="best_fit",
        pad_multiple=16,
        long_documents="skip",
    )
    train(validate(config))
    losses = [m["loss"] for m in read_metrics(tmp_path / "run", "train")]
    assert len(losses) == STEPS and np.isfinite(losses).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ("pairs",), "packing": "best_fit"}, "pairs holds preference pairs"),
        ({"sources": ("pairs",)}, "set data.packing='best_fit'"),
        ({"sources": ("pairs", "chats"), "packing": "best_fit"}, "mix preference pairs with other"),
        ({"sources": ("web",), "weights": (1.0, 2.0)}, "one positive number for each of"),
        ({"sources": ("web",), "source": "elsewhere"}, "is not read where config.data.sources"),
        (
            {"sources": ("web",), "packing": "best_fit", "pad_multiple": 6},
            "must be a multiple of each",
        ),
        ({"sources": ("nowhere",)}, "has no manifest.json: it was not prepared"),
        ({"sources": ("web",), "packing": "first_fit"}, "choose one of"),
    ],
)
def test_sources_that_cannot_be_used_are_named(folder, tmp_path, changes, message):
    changes = dict(changes)
    config = config_of(folder, tmp_path / "run", *changes.pop("sources"), **changes)
    with pytest.raises(ConfigError, match=message):
        train(validate(config))
