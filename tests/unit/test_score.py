"""`llada2 score`, called as the command does."""

import dataclasses
import io
import json
import math
import re
import sys

import pytest

from llada2_jax import cli, progress
from llada2_jax.checkpoint import ModelBundle, save_model
from llada2_jax.data.tokenizer import tokenizer_files, train_tokenizer
from llada2_jax.evals.likelihood import ROW_LENGTH, default_row_length
from llada2_jax.hub import load_bundle, load_model
from llada2_jax.types import SpecialTokens
from tests.helpers import Terminal, exit_status, one_layer, random_params

CFG = one_layer(vocab_size=264, max_position_embeddings=64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    bundle = ModelBundle(
        config=CFG,
        params=random_params(CFG, 0, 0.3),
        special=SpecialTokens(mask=0, eos=1, pad=1, bos=2),
        tokenizer_files=tokenizer_files(train_tokenizer(["a text"], CFG.vocab_size)),
        generation={"block_size": 4},
    )
    save_model(folder, bundle)
    return folder


@pytest.fixture
def score(checkpoint, capfd):
    """Runs `llada2 score` in rows of 16 with two samples, where there are any: (status, stdout,
    stderr)."""

    def call(*argv, folder=checkpoint):
        capfd.readouterr()
        exact = {"--samples", "--block-size", "ar"} & set(argv)
        common = ["--row-length", "16", *([] if exact else ["--samples", "2"])]
        status = exit_status("score", "--checkpoint", str(folder), *common, *argv)
        return status, *capfd.readouterr()

    return call


def lines(output):
    return [json.loads(line) for line in output[1].splitlines()]


def test_prints_a_line_a_text_and_the_total(score):
    status, out, err = score("--text", "a text", "--text", "äöü")
    assert status == 0 and "objective bdlm, samples 2, block size 4" in err
    head, *rows = out.splitlines()
    assert head.split() == ["bits/byte", "±", "nats", "±", "tokens", "bytes"]
    first, second, total = (row.split()[-6:] for row in rows)
    assert [int(r[-1]) for r in (first, second, total)] == [6, 6, 12]
    assert float(total[2]) == pytest.approx(float(first[2]) + float(second[2]), abs=0.02)
    assert float(first[1]) > 0


def test_the_figures_agree_with_each_other(score):
    first, second, total = lines(score("--text", "a text", "--text", "another", "--json"))
    for r in (first, second, total):
        assert r["bits_per_byte"] == pytest.approx(r["nats"] / math.log(2) / r["bytes"])
        assert r["block_size"] == 4 and r["samples"] == 2 and r["objective"] == "bdlm"
    assert total["name"] == "total"
    assert total["tokens"] == first["tokens"] + second["tokens"]
    assert total["nats_stderr"] == pytest.approx(
        math.hypot(first["nats_stderr"], second["nats_stderr"])
    )


def test_block_size_one_and_ar_are_exact_and_differ(score):
    (one, _) = lines(score("--text", "some text", "--block-size", 1, "--json"))
    (ar, _) = lines(score("--text", "some text", "--objective", "ar", "--json"))
    assert one["nats_stderr"] == ar["nats_stderr"] == 0 and one["samples"] == ar["samples"] == 1
    assert one["nats"] != ar["nats"] > 0
    assert one["tokens"] == ar["tokens"] and "block_size" not in ar


def test_a_checkpoint_of_block_size_one_is_exact_too(checkpoint, score, tmp_path):
    bundle = dataclasses.replace(load_model(checkpoint), generation={"block_size": 1})
    save_model(tmp_path / "exact", bundle)
    status, _, err = score("--text", "a", folder=tmp_path / "exact")
    assert status == 2 and "--samples has no meaning at block size 1" in err


def test_one_sample_has_no_standard_error(score):
    (line, _) = lines(score("--text", "some text", "--samples", 1, "--json"))
    assert line["nats_stderr"] is None
    assert "?" in score("--text", "some text", "--samples", 1)[1]


def test_a_long_text_spans_rows(score):
    text = "x = 1\n" * 12  # 72 bytes, rows of 15 tokens after the bos
    (line, _) = lines(score("--text", text, "--block-size", 1, "--json"))
    assert line["bytes"] == 72 and line["tokens"] > 15
    parts = lines(score("--text", "x = 1\n", "--block-size", 1, "--json"))[0]
    assert line["tokens"] == 12 * parts["tokens"]


def test_rows_are_as_long_as_in_training(checkpoint):
    bundle = load_bundle(checkpoint)
    assert default_row_length(bundle) == 64  # nothing tells: what the model takes
    long = dataclasses.replace(bundle, config=one_layer(max_position_embeddings=1 << 20))
    assert default_row_length(long) == ROW_LENGTH
    trained = dataclasses.replace(bundle, provenance={"step": 3, "row_length": 48})
    assert default_row_length(trained) == 48
    merged = {"merged": [{"row_length": 16}, {"row_length": 32}, {}], "row_length": 0}
    assert default_row_length(dataclasses.replace(bundle, provenance=merged)) == 32


def test_the_row_length_is_the_checkpoint_s_own(checkpoint, tmp_path, capfd):
    """16 tokens of context give what --row-length 16 gives, and not what 64 do."""
    bundle = dataclasses.replace(load_model(checkpoint), provenance={"row_length": 16})
    save_model(tmp_path / "trained", bundle)

    def nats(folder, *options):
        text = ["--text", "x = 1\n" * 12, "--block-size", 1, "--json"]
        assert exit_status("score", "--checkpoint", folder, *text, *options) == 0
        return json.loads(capfd.readouterr().out.splitlines()[0])["nats"]

    assert nats(tmp_path / "trained") == nats(checkpoint, "--row-length", 16)
    assert nats(tmp_path / "trained") != nats(checkpoint) == nats(checkpoint, "--row-length", 64)


def test_a_bar_on_a_terminal(checkpoint, monkeypatch, capfd):
    argv = ["score", "--checkpoint", checkpoint, "--text", "a text " * 60, "--row-length", 32]
    monkeypatch.setattr(progress, "DELAY", 0)
    assert exit_status(*argv) == 0
    assert "row" not in capfd.readouterr().err
    monkeypatch.setattr("sys.stderr", Terminal())
    assert exit_status(*argv) == 0
    rows = 8 * 10  # samples, and rows of 31 tokens for 300
    assert re.search(rf"scoring: 100%.* {rows}/{rows} \[.*<.*row/s\]", sys.stderr.getvalue())


def test_files_lines_and_stdin(score, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"a text\r\n")
    assert lines(score("--file", tmp_path / "a.txt", "--json"))[0]["bytes"] == 8
    (tmp_path / "a.jsonl").write_text('{"text": "a text", "label": 3}\n\n{"text": "b"}\n')
    first, second, _ = lines(score("--texts-file", tmp_path / "a.jsonl", "--json"))
    assert first["label"] == 3 and first["bytes"] == 6 and second["bytes"] == 1
    monkeypatch.setattr("sys.stdin", io.StringIO("a text"))
    (piped, _) = lines(score("--json"))
    assert piped["nats"] == first["nats"] and piped["name"] == "stdin"


@pytest.mark.parametrize(
    ("status", "argv", "message"),
    [
        (1, ["--text", "a", "--text", ""], "text 2 is empty"),
        (1, ["--file", "/nowhere/at/all"], "No such file"),
        (1, ["--text", "a", "--row-length", "65"], "row length 65: must be at least 2, and at mo"),
        (1, ["--text", "a", "--row-length", "1"], "max_position_embeddings=64"),
        (2, ["--text", "a", "--block-size", "0"], "--block-size: 0: must be at least 1"),
        (2, ["--text", "a", "--samples", "-1"], "--samples: -1: must be at least 1"),
        (2, ["--text", "a", "--objective", "ar", "--block-size", "4"], "no meaning for --objecti"),
        (2, ["--text", "a", "--objective", "ar", "--samples", "3"], "--samples has no meaning for"),
        (2, ["--text", "a", "--block-size", "1", "--samples", "3"], "meaning at block size 1"),
        (2, ["--text", "a", "--dtype", "float31"], "invalid choice: 'float31'"),
    ],
)
def test_errors_say_what_is_wrong(score, status, argv, message):
    ended, out, err = score(*argv)
    assert ended == status and not out
    assert "llada2 score: error: " in err and message in err and "Traceback" not in err


def test_errors_in_files_name_the_place(score, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"a\xff")
    assert "not UTF-8 at byte 1" in score("--file", tmp_path / "a.bin")[2]
    for text, message in [
        ('{"text": "a"}\n{"prompt": "b"}\n', ':2: no "text" among the fields'),
        ("{oops\n", ":1: not JSON"),
        ("\n", "no texts"),
    ]:
        (tmp_path / "a.jsonl").write_text(text)
        assert message in score("--texts-file", tmp_path / "a.jsonl")[2]
    assert "no such directory" in score("--text", "a", folder=tmp_path / "none")[2]


def test_a_checkpoint_without_a_tokenizer(score, tmp_path):
    special = SpecialTokens(mask=0, eos=1, pad=1)
    save_model(tmp_path / "bare", ModelBundle(CFG, random_params(CFG, 0, 0.3), special))
    status, _, err = score("--text", "a", folder=tmp_path / "bare")
    assert status == 1 and "has no tokenizer.json" in err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["score", "--help"])
    assert end.value.code == 0 and "llada2 score --checkpoint" in capsys.readouterr().out
