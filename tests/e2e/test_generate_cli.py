"""`llada2 generate`, called as the command does."""

import io
import json
import re
import sys

import pytest

from llada2_jax import cli, progress
from llada2_jax.checkpoint import ModelBundle, save_model
from llada2_jax.data.tokenizer import tokenizer_files, train_tokenizer
from llada2_jax.types import SpecialTokens
from tests.helpers import Terminal, exit_status, one_layer, random_params

CFG = one_layer(vocab_size=270, initializer_range=0.5, max_position_embeddings=64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    tokenizer = train_tokenizer(["a short text to learn from"], CFG.vocab_size)
    bundle = ModelBundle(
        config=CFG,
        params=random_params(CFG, 0, 0.3),
        special=SpecialTokens(mask=0, eos=1, pad=1, bos=2),
        tokenizer_files=tokenizer_files(tokenizer),
        generation={"block_size": 4, "max_new_tokens": 7, "threshold": 0.2},
    )
    save_model(folder, bundle)
    return folder


@pytest.fixture
def llada2(checkpoint, capfd):
    """Runs `llada2 generate` on the checkpoint: (status, stdout, stderr)."""

    def call(*argv, folder=checkpoint):
        capfd.readouterr()
        status = exit_status("generate", "--checkpoint", folder, *argv)
        return status, *capfd.readouterr()

    return call


def test_streams_and_reports(llada2):
    status, out, err = llada2("--prompt", "a text")
    assert status == 0 and len(out) > 1
    assert re.search(
        r"7 tokens in [\d.]+ s: [\d.]+ tokens/s; [\d.]+ tokens per forward, [\d.]+ with commits "
        r"\(\d+ denoising \+ \d+ commit forwards\); compiled for [\d.]+ s",
        err,
    )
    assert llada2("--prompt", "a text", "--no-stream")[1] == out
    assert llada2("--prompt", "a text", "--fuse-commit")[1] == out


def test_several_prompts(llada2):
    argv = ["--prompt", "a text", "--prompt", "to learn", "--temperature", "1", "--seed", "3"]
    _, out, _ = llada2(*argv)
    assert out.count("=== ") == 2
    assert llada2(*argv, "--no-stream")[1] == out


def test_jsonl_in_jsonl_out(llada2, tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a text", "id": 7}, {"prompt": "to\u2028learn é"}]
    file.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n\n" for x in lines))
    status, out, _ = llada2("--prompts-file", file)
    answers = [json.loads(line) for line in out.rstrip("\n").split("\n")]
    assert status == 0
    assert [a["prompt"] for a in answers] == ["a text", "to\u2028learn é"]
    assert answers[0]["id"] == 7
    assert answers[0]["completion"] + "\n" == llada2("--prompt", "a text")[1]
    assert answers[0]["accepted"] >= len(answers[0]["tokens"]) == 7
    assert answers[0]["denoise_forwards"] >= 1 and answers[0]["finish_reason"] == "length"


def test_stdin_is_one_prompt(llada2, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a text"))
    assert llada2()[1] == llada2("--prompt", "a text")[1]


def test_bad_lines_are_named(llada2, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": \n[1]\n{"text": "b"}\n{"prompt": 3}\n')
    status, out, err = llada2("--prompts-file", file)
    assert status == 1 and not out
    for line, problem in (
        (2, "not JSON"),
        (3, "a list instead of an object"),
        (4, """no "prompt" among the fields ['text']"""),
        (5, '"prompt" is a int, not a text'),
    ):
        assert f"{file}:{line}: {problem}" in err
    file.write_text("\n")
    assert "no prompts" in llada2("--prompts-file", file)[2]
    file.write_bytes(b"\xff")
    assert "not UTF-8 at byte 0" in llada2("--prompts-file", file)[2]


def test_user_errors_are_one_line(llada2, tmp_path):
    for expected, arguments, message in (
        (2, ["--threshold", "2"], "threshold=2.0: must be in [0, 1]"),
        (1, ["--max-new-tokens", "80"], "exceed max_position_embeddings=64"),
        (2, ["--max-batch", "0"], "--max-batch: 0: must be at least 1"),
    ):
        status, out, err = llada2("--prompt", "a", *arguments)
        assert status == expected and not out and "Traceback" not in err
        assert "llada2 generate: error: " in err and message in err
    status, _, err = llada2("--prompt", "a", folder=tmp_path / "nowhere")
    assert status == 1 and "nowhere" in err
    status, _, err = llada2("--prompts-file", tmp_path / "absent.jsonl")
    assert status == 1 and "absent.jsonl" in err


def test_a_bar_on_a_terminal(llada2, tmp_path, monkeypatch):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a text"}\n' * 5)
    monkeypatch.setattr(progress, "DELAY", 0)
    arguments = ["--prompts-file", file, "--max-batch", 2]
    assert "completions" not in llada2(*arguments)[2]
    monkeypatch.setattr("sys.stderr", Terminal())
    llada2(*arguments)
    assert re.search(r"completions: 100%.* 5/5 \[.*<.*prompt.*\]", sys.stderr.getvalue())


def test_seeds(llada2):
    sample = ["--prompt", "a text", "--temperature", "1.5", "--top-p", "0.95", "--seed"]
    first = llada2(*sample, 1)[1]
    assert first == llada2(*sample, 1)[1] != llada2(*sample, 2)[1]


def test_compare_uncached(llada2):
    status, _, err = llada2("--prompt", "a text", "--compare-uncached")
    assert status == 0
    assert re.search(r"without a cache: [\d.]+ s, [\d.]+ times as long; the same tokens: yes", err)


def test_help_is_worth_reading(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "examples:" in text and "--compare-uncached" in text and "JSONL" in text
