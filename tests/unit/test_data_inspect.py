"""What people see of rows: every token once, marks where the coordinates say, no control codes."""

import html
import re

import numpy as np
import pytest
from tokenizers import Tokenizer

from llada2_jax import cli
from llada2_jax.assets import TINY_AR
from llada2_jax.data import inspect as packed
from llada2_jax.data.prepare import prepare
from tests.data_helpers import files, job, texts, write_jsonl
from tests.helpers import exit_status

TOKENIZER = Tokenizer.from_str(files()["tokenizer.json"])


def row_of(text, segments, loss, starts=None):
    ids = TOKENIZER.encode(text).ids
    assert len(ids) == len(segments), TOKENIZER.encode(text).tokens
    segments = np.asarray(segments)
    positions = np.concatenate([np.arange((segments == s).sum()) for s in np.unique(segments)])
    if (segments == 0).any():  # padding stands at the end
        positions = np.concatenate([np.arange((segments == s).sum()) for s in (1, 2, 0)])
    return {
        "tokens": np.asarray(ids),
        "segment_ids": segments,
        "positions": positions,
        "loss_mask": np.asarray(loss, bool),
        "document_ids": segments * 11,
        "visits": np.zeros_like(segments),
    }


ROW = row_of(
    "<role>alpha beta gamma<|role_end|> delta alpha<|endoftext|><|endoftext|>",
    [1, 1, 1, 1, 1, 2, 2, 2, 0],
    [0, 0, 1, 1, 1, 1, 1, 1, 0],
)


def test_marks_stand_where_the_coordinates_say():
    runs = list(packed.runs(ROW, TOKENIZER, 4))
    assert [(r.text, r.segment, r.supervised, r.block) for r in runs] == [
        ("<role>alpha", 1, False, True),
        (" beta gamma", 1, True, False),
        ("<|role_end|>", 1, True, True),
        (" delta alpha<|endoftext|>", 2, True, True),
        ("<|endoftext|>", 0, False, False),
    ]
    assert packed.as_text(iter(runs)) == (
        "\n⟦1 │<role>alpha« beta gamma│<|role_end|>»⟧\n⟦2 │« delta alpha<|endoftext|>»⟧\n░"
    )
    assert packed.describe(ROW) == (
        "2 segments of 2 documents (11, 22), 88.9% full, 66.7% supervised, epochs 0-0"
    )


def test_colours_leave_the_text_alone_and_hide_control_codes():
    runs = list(packed.runs(ROW, TOKENIZER, 4))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", packed.as_ansi(iter(runs)))
    text = "".join(r.text for r in runs if r.segment)
    assert plain.replace("│", "").replace("░", "") == text
    evil = packed.Run("a\x1b]0;title\x07b\nc", 1, True, False)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", packed.as_ansi(iter([evil])))
    assert shown == "a\\x1b]0;title\\x07b\nc"
    assert packed.as_text(iter([evil])) == "\n⟦1 «a\\x1b]0;title\\x07b\nc»⟧"
    page = packed.as_html([("row <0>", [packed.Run("<script>", 1, True, True), evil])])
    assert "\x1b" not in page and "\\x1b]0;title" in page
    assert "<script>" not in page and "&lt;script&gt;" in page and "row &lt;0&gt;" in page
    page = packed.as_html([("row 0", runs)])
    assert html.unescape(re.sub(r"<[^>]+>", "", page.split("</h2>")[1])) == text + "░\n"


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    rows = [
        {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": t[::-1]}]}
        for t in texts(30)
    ]
    path = write_jsonl(folder / "a.jsonl", rows)
    prepare(job(path, content="chat", template="llada2"), folder / "out", processes=1)
    return folder / "out"


def test_inspect_shows_what_a_run_reads(chats, capsys, tmp_path):
    options = ["--row-length", "256", "--rows", "2", "--block-size", "8", "--no-color"]
    assert cli.main(["data", "inspect", str(chats), *options]) == 0
    printed = capsys.readouterr().out
    assert "rows an epoch" in printed and "% full" in printed and "0 skipped" in printed
    assert "⟦1 │<role>SYSTEM</role>" in printed and "row 1: " in printed
    # Each answer is marked, and nothing else.
    for marked in re.findall("«([^»]*)»", printed.replace("│", "")):
        assert re.fullmatch(r"[^<]+<\|role_end\|>(<\|endoftext\|>)+", marked)
    page = tmp_path / "rows.html"
    assert cli.main(["data", "inspect", str(chats), *options, "--html", str(page)]) == 0
    assert page.read_text(encoding="utf-8").count("<h2>") == 2


def test_bench_prints_tokens_per_second_per_core(chats, capsys):
    options = ["--row-length", "256", "--seconds", "0.2", "--rows-per-step", "4"]
    assert cli.main(["data", "bench", str(chats), *options]) == 0
    assert '"tokens_per_second_per_core": ' in capsys.readouterr().out


def test_mistakes_are_told_without_a_traceback(tmp_path, chats, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text('{"model": {}}')
    chats_file = str(write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}]))
    preparing = ["prepare", chats_file, str(tmp_path / "o"), "--tokenizer"]
    for status, arguments, message in (
        (1, ["inspect", str(tmp_path)], "has no manifest.json"),
        (
            1,
            ["inspect", str(chats), "--row-length", "100"],
            "data.row_length=100 is not a multiple",
        ),
        (
            1,
            ["prepare", "nowhere.jsonl", str(tmp_path / "o"), "--tokenizer", str(tmp_path)],
            "it holds no",
        ),
        (1, [*preparing, str(tmp_path / "broken")], "broken: tokenizer.json cannot be read: "),
        (2, [*preparing, str(TINY_AR), "--max-bad-fraction", "nan"], "max_bad_fraction=nan"),
        (2, [*preparing, str(TINY_AR), "--row-length", "-5"], "-5: must be at least 1"),
        (2, [*preparing, str(TINY_AR), "--processes", "-1"], "-1: must be at least 1"),
        (2, ["inspect", str(chats), "--row-length", "0"], "0: must be at least 1"),
        (2, ["bench", str(chats), "--row-length", "-8"], "-8: must be at least 1"),
        (2, ["inspect", str(chats), "--block-size", "0"], "0: must be at least 1"),
        (2, ["inspect", str(chats), "--rows", "0"], "0: must be at least 1"),
        (2, ["inspect", str(chats), "--row", "-1"], "-1: must be at least 0"),
        (2, ["bench", str(chats), "--seed", "-1"], "-1: must be at least 0"),
        (2, ["bench", str(chats), "--seconds", "nan"], "--seconds nan: must be above 0"),
        (2, [*preparing, str(TINY_AR), "--retry-seconds", "nan"], "retry_seconds=nan"),
        (2, ["bench", str(chats), "--weights", "x"], "--weights: invalid"),
        (2, ["bench", str(chats), "--weights", "1,2"], "one positive number for each"),
    ):
        assert exit_status("data", *arguments) == status
        assert message in capsys.readouterr().err
