"""Bars on a terminal, and nothing elsewhere."""

import io
import re
import sys

import pytest

from llada2_jax import progress
from llada2_jax.data.documents import documents
from llada2_jax.data.packing import tokenize
from llada2_jax.data.tokenizer import train_tokenizer
from tests.helpers import Terminal

BAR = r"{}: 100%.* {}/{} \[\d\d:\d\d<\d\d:\d\d, .*{}/s\]"


@pytest.fixture
def folder(tmp_path):
    for i in range(12):
        (tmp_path / f"m{i}.py").write_text(f"x = {i}\n" * 5)
    return tmp_path


def read(folder) -> None:
    found = list(documents(str(folder), "train"))
    tokenize(found, train_tokenizer((d.text for d in found), 270), eos=1, bos=None)


def test_reading_and_tokenizing_a_corpus(folder, monkeypatch, capfd):
    monkeypatch.setattr(progress, "DELAY", 0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    read(folder)
    shown = sys.stderr.getvalue()
    count = len(list(documents(str(folder), "train")))
    assert re.search(BAR.format(r"reading \(train\)", count, count, "file"), shown)
    assert re.search(BAR.format("tokenizing", count, count, "document"), shown)


def test_the_tokenizer_s_own_bars_go_by_the_same_rule(monkeypatch):
    asked = []
    trainer = train_tokenizer.__globals__["trainers"].BpeTrainer

    def spy(**options):
        asked.append(options["show_progress"])
        return trainer(**options | {"show_progress": False})

    monkeypatch.setattr("llada2_jax.data.tokenizer.trainers.BpeTrainer", spy)
    for stderr in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stderr)
        train_tokenizer(["a text"], 270)
    assert asked == [False, True]


def test_silent_where_stderr_is_no_terminal(folder, monkeypatch, capfd):
    monkeypatch.setattr(progress, "DELAY", 0)
    read(folder)
    with progress.bar(what="bytes", total=3, unit="B") as bar:
        bar.update(3)
    assert capfd.readouterr().err == ""


def test_what_is_done_at_once_shows_none(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress.bar(range(3), "short")) == [0, 1, 2]
    assert sys.stderr.getvalue() == ""
