"""Sources, whatever their format: the rows, where they stand, and what is no source."""

import errno
import importlib
import json
import logging
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from tokenizers import Tokenizer

from llada2_jax import data_cli
from llada2_jax.data import paths, sources
from llada2_jax.data.documents import stable_hash
from llada2_jax.data.examples import BadRow
from llada2_jax.data.prepare import (
    MANIFEST,
    PrepareError,
    prepare,
)
from llada2_jax.data.prepared import PreparedDocuments
from llada2_jax.data.sources import SourceError, SourceSpec, plan, read, resolve_format
from tests.data_helpers import FORMATS, contents, documents_of, files, job, texts, write_jsonl

TOKENIZER = Tokenizer.from_str(files()["tokenizer.json"])


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_its_rows_and_says_where_they_stand(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 300)
    monkeypatch.setattr(sources, "UNIT_ROWS", 6)
    (tmp_path / "in").mkdir()
    rows = texts(40)
    FORMATS[kind](tmp_path / "in", rows)
    spec = resolve_format(SourceSpec(str(tmp_path / "in")))
    assert spec.format == kind.split(".")[0]
    units = plan(spec)
    assert len(units) > 1
    found = [row["text"] for unit in units for row in read(spec, unit) if row is not None]
    assert sorted(found) == sorted(rows)
    # Every document leads back to its row.
    prepare(job(tmp_path / "in"), tmp_path / "out", processes=1)
    documents = PreparedDocuments(tmp_path / "out", "train")
    for i in (0, len(documents.ids) - 1):
        text = TOKENIZER.decode(documents.read(i, 1, int(documents.lengths[i]) - 1)[0].tolist())
        place = documents.place(i)
        if kind == "jsonl":
            path, line = place.rsplit(":", 1)
            assert json.loads(Path(path).read_text().split("\n")[int(line) - 1])["text"] == text
        elif kind == "text":
            assert Path(place).read_text(encoding="utf-8") == text
        elif kind == "huggingface":
            assert rows[int(place.split()[-1])] == text
    assert len({documents.place(i) for i in range(len(documents.ids))}) == len(documents.ids)
    assert sorted(t for t, _ in documents_of(tmp_path / "out")) == sorted(rows)


def test_documents_are_supervised_but_for_bos(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts(9)])
    splits = prepare(job(tmp_path / "a.jsonl"), tmp_path / "out", processes=1)["splits"]
    for _, weights in documents_of(tmp_path / "out"):
        assert weights == [0.0] + [1.0] * (len(weights) - 1)
    for total in splits.values():
        assert total["supervised_tokens"] == total["tokens"] - total["documents"] > 0
    prepare(job(tmp_path / "a.jsonl", bos=False), tmp_path / "without", processes=1)
    documents = PreparedDocuments(tmp_path / "without", "train")
    assert documents.read(0, 0, 1)[1][0] == 1.0


def test_lines_that_cross_units_come_once(tmp_path, monkeypatch):
    rows = [{"text": t} for t in texts(50)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    size = path.stat().st_size
    for step in (1, 7, 64, size - 1, size, size + 1):
        monkeypatch.setattr(sources, "UNIT_BYTES", step)
        spec = SourceSpec(str(path), "jsonl")
        assert [row for unit in plan(spec) for row in read(spec, unit)] == rows


def test_names_and_splits_do_not_depend_on_where_the_source_lies(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "a.jsonl", [{"text": t} for t in texts(30)])
        prepare(job(tmp_path / name), tmp_path / f"{name}-out", processes=1)
    a, b = (PreparedDocuments(tmp_path / f"{n}-out", "train") for n in ("here", "there"))
    np.testing.assert_array_equal(a.ids, b.ids)
    assert 0 < len(a.ids) < 30


def test_a_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SourceError, match=r"nothing\.jsonl: no such file"):
        prepare(job(tmp_path / "nothing.jsonl"), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="empty: no such file .*, or none that matches"):
        prepare(job(tmp_path / "empty"), tmp_path / "out")
    with pytest.raises(SourceError, match="format 'csv': choose one of auto, jsonl"):
        prepare(job(tmp_path, source={"format": "csv"}), tmp_path / "out")
    with pytest.raises(PrepareError, match="gs://b/out: ArrayRecord files are written to disks"):
        prepare(job(tmp_path), "gs://b/out")


def test_auto_refuses_files_of_several_formats(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}])
    (tmp_path / "LICENSE").write_text("a file of no known format is nobody's")
    assert resolve_format(SourceSpec(str(tmp_path))).format == "jsonl"
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "README.md").write_text("text")
    with pytest.raises(SourceError, match=r"several formats: .*text \(.*README\.md\).*--format"):
        resolve_format(SourceSpec(str(tmp_path)))
    for pattern, kind in (("*.md", "text"), ("*.jsonl", "jsonl")):
        assert resolve_format(SourceSpec(str(tmp_path), pattern=pattern)).format == kind
    assert resolve_format(SourceSpec(str(tmp_path), "jsonl")).format == "jsonl"
    # What is asked for by name is not left out.
    for path, pattern in (("", "LIC*"), ("LICENSE", ""), ("*", "")):
        with pytest.raises(SourceError, match=r"LICENSE: no format has files of such n"):
            resolve_format(SourceSpec(str(tmp_path / path), pattern=pattern))
    with pytest.raises(SourceError, match=r"none that matches \*\.md \(1 others, such as .*b\.jso"):
        resolve_format(SourceSpec(str(tmp_path / "b.jsonl"), pattern="*.md"))


def test_nothing_is_left_out_without_a_word(tmp_path, caplog):
    """Names in capitals, linked folders, links in circles, brackets that are no glob."""
    folder = tmp_path / "in"
    for below in (folder, folder / "sub", tmp_path / "elsewhere"):
        below.mkdir()
    paths = [folder / n for n in ("a[1].jsonl", "b.json", "D.JSONL", "E.JSON.GZ", "sub/f.ndjson")]
    rows = texts(6)
    for path, text in zip([*paths, tmp_path / "elsewhere/g.jsonl"], rows, strict=True):
        if path.suffix == ".GZ":
            path.write_bytes(write_jsonl(tmp_path / "a.gz", [{"text": text}]).read_bytes())
        else:
            write_jsonl(path, [{"text": text}])
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "sub" / "up").symlink_to(folder)
    manifest = prepare(job(folder), tmp_path / "all", processes=1)
    assert sorted(t for t, _ in documents_of(tmp_path / "all")) == rows
    assert manifest["files"] == {"read": 6, "left_out": 0} and not caplog.text
    (folder / "c.jsonl.bz2").write_bytes(b"x")
    (folder / "sub" / "LICENSE").write_text("x")
    manifest = prepare(job(folder), tmp_path / "most", processes=1)
    left = {"read": 6, "left_out": 2, "example": str(folder / "c.jsonl.bz2")}
    assert manifest["files"] == left
    assert f"6 files of format jsonl are read, 2 are left out, such as {folder}/c.js" in caplog.text
    for path, counts in (
        (paths[0], {"read": 1, "left_out": 0}),
        (folder / "*[bn]*", {"read": 3, "left_out": 2, "example": str(folder / "link")}),
    ):
        assert sources.survey(SourceSpec(str(path), "jsonl")) == counts


@pytest.mark.parametrize("kind", [k for k in FORMATS if k != "huggingface"])
def test_names_that_are_not_utf8_are_names(kind, tmp_path, capsysbinary, caplog):
    """Of folders, of files, of what is left out. (The library of `huggingface` takes none.)"""
    # pytest-xdist sends what was logged as UTF-8.
    caplog.set_level(logging.CRITICAL, logger="llada2_jax")
    odd = os.fsdecode(b"caf\xe9")
    folder, tokenizer, out = tmp_path / odd, tmp_path / "tokenizer", tmp_path / "out"
    (tmp_path / "in").mkdir()
    FORMATS[kind](tmp_path / "in", texts(20))
    (tmp_path / "in").rename(folder)
    for file in [p for p in folder.rglob("*") if p.is_file()]:
        file.rename(file.with_name(odd + file.name))
    (folder / f"{odd}.csv").touch()
    tokenizer.mkdir()
    for name, text in files().items():
        (tokenizer / name).write_text(text)
    # Processes take a second to start: once is enough to see that names reach them.
    processes = "2" if kind == "jsonl" else "1"
    command = ["prepare", str(folder), str(out), "--tokenizer", str(tokenizer)]
    command += ["--processes", processes]
    for _ in range(2):  # the second time nothing is left to do
        assert data_cli.main(command) == 0
        assert rb"(such as " + bytes(tmp_path) + rb"/caf\xe9/caf\xe9.csv)" in (
            capsysbinary.readouterr().out
        )
    assert sorted(t for t, _ in documents_of(out)) == sorted(texts(20))
    place = PreparedDocuments(out, "train").place(0)
    assert place.startswith(str(folder / odd if kind != "text" else folder)) and odd in place


def test_hashes_of_names_stay_as_they_are():
    assert stable_hash("é.txt:0:1") == 1123000069
    assert stable_hash(os.fsdecode(b"\xe9.txt")) == 502903290


def test_planning_takes_time_in_proportion_to_the_files(tmp_path, monkeypatch):
    additions = []

    class Size(int):
        def __add__(self, other):
            additions.append(1)
            return Size(int(self) + int(other))

        __radd__ = __add__

    names = [f"{i}.txt" for i in range(300)]
    for name in names:
        (tmp_path / name).touch()
    file = types.SimpleNamespace(stat=lambda: types.SimpleNamespace(length=Size(1)))
    monkeypatch.setattr(sources, "_files", lambda spec: [(file, name) for name in names])
    (unit,) = plan(SourceSpec(str(tmp_path), "text"))
    assert unit.size == 300 and len(additions) <= 2 * 300

    comparisons = []

    class Entry(type(epath.Path())):
        def __eq__(self, other):
            comparisons.append(1)
            return super().__eq__(other)

        __hash__ = type(epath.Path()).__hash__

    for i in range(300):
        (tmp_path / f"{i}").mkdir()
    found, folders = paths.matched(Entry(tmp_path) / "*")
    assert sorted(f.name for f in found) == sorted(names) and len(folders) == 300
    assert len(comparisons) <= 2 * 600


@pytest.mark.parametrize("kind", ["text", "jsonl", "huggingface"])
def test_what_is_no_file_is_left_out_with_a_word_and_never_waited_for(kind, tmp_path, caplog):
    folder = tmp_path / "in"
    folder.mkdir()
    FORMATS[kind](folder, texts(9))
    whole = prepare(job(folder), tmp_path / "whole", processes=1)
    (folder / "a.txt").symlink_to(tmp_path / "nowhere.txt")
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")  # to itself
    os.mkfifo(folder / "c.txt")
    os.mkfifo(folder / "d.arrow")
    caplog.clear()
    manifest = prepare(job(folder), tmp_path / "out", processes=1)
    assert manifest["splits"] == whole["splits"] and manifest["shards"] == whole["shards"]
    if kind == "huggingface":
        return
    assert manifest["files"]["read"] == whole["files"]["read"]
    assert manifest["files"]["no_files"] == manifest["files"]["left_out"] == 4
    assert f"4 links to nothing, pipes or the like are left out, such as {folder}/a" in caplog.text
    for name in ("a.txt", "loop.jsonl", "c.txt", "[lc]*.*"):  # nor where they are asked for
        with pytest.raises(SourceError, match="no such file .links to nothing and pipes are"):
            prepare(job(folder / name), tmp_path / "other", processes=1)


def test_array_records_in_a_bucket_are_refused_with_a_way_out(tmp_path):
    task = job("gs://b/x", source={"format": "array_record"})
    with pytest.raises(SourceError, match=r"gs://b/x: ArrayRecord .* mount .*\(gcsfuse\), or copy"):
        prepare(task, tmp_path / "out", processes=1)


def test_json_that_is_no_lines_is_bad_rows(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": t} for t in texts(9)], indent=1))
    with pytest.raises(
        PrepareError, match=r"not_json \(.*JSON object; a row is one line\)[^$]*json:1:"
    ):
        prepare(job(tmp_path / "a.json"), tmp_path / "out", processes=1)


def test_values_that_are_no_rows_are_bad_rows(tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.array([b"a", b"\xff", b"c", b"d"]).view(pyarrow.string())
    times = pyarrow.array([0, 0, 2**60, 0], pyarrow.timestamp("ms"))
    table = pyarrow.table({"text": texts, "at": times})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "huggingface")
    for name in ("a.parquet", "huggingface"):
        spec = resolve_format(SourceSpec(str(tmp_path / name)))
        rows = [row for unit in plan(spec) for row in read(spec, unit)]
        assert [row.kind if isinstance(row, BadRow) else row["text"] for row in rows] == [
            "a", "not_utf8", "wrong_type", "d",
        ]  # fmt: skip
    # And those of seqio, whose texts are bytes.
    assert sources._plain_row({"text": "é".encode()}) == {"text": "é"}
    assert sources._plain_row({"text": b"\xff"}).kind == "not_utf8"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_compressed_file_without_bytes_is_damaged(name, tmp_path):
    write_jsonl(tmp_path / f"b{name}", [{"text": "x"}])
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(SourceError, match=f"{name} has no bytes"):
        prepare(job(tmp_path), tmp_path / "out", processes=1)


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.array_record", "huggingface"]
)
def test_a_damaged_file_stops_with_its_name(name, tmp_path):
    if name == "huggingface":
        FORMATS[name](tmp_path / name, texts(500))
        (arrow,) = (tmp_path / name).glob("*.arrow")
        arrow.write_bytes(arrow.read_bytes()[:-9000])
    elif name.startswith("a.jsonl"):
        write_jsonl(tmp_path / name, [{"text": t} for t in texts(500)])
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    else:
        (tmp_path / name).write_bytes(b"not what the name says" * 10)
    with pytest.raises(SourceError, match=name):
        prepare(job(tmp_path / name), tmp_path / "out", processes=1)
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_an_optional_package_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "seqio", None)
    with pytest.raises(SourceError, match=r"'seqio' reads seqio tasks: pip install .*\[seqio\]"):
        prepare(job("tasks:x", source={"format": "seqio"}), tmp_path / "out")


def test_seqio_tasks_and_mixtures(tmp_path):
    seqio = pytest.importorskip("seqio", reason="seqio (extra 'seqio') is not installed")
    tensorflow = importlib.import_module("tensorflow")

    def rows(split, shuffle_files, seed=None):
        return tensorflow.data.Dataset.from_tensor_slices(
            {"inputs": ["?"] * 20, "targets": texts(20)}
        )

    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=False)
    for name in ("llada2_a", "llada2_b"):
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(rows, splits=["train"]),
            preprocessors=[seqio.preprocessors.tokenize],
            output_features={"inputs": feature, "targets": feature},
        )
    seqio.MixtureRegistry.add("llada2_mixture", [("llada2_a", 1), ("llada2_b", 3)])
    wanted = [[ord("?") + 3, *(b + 3 for b in t.encode())] for t in texts(20)]
    for name in ("llada2_a", "llada2_mixture"):
        options = {"content": "tokens", "field": "targets", "prompt_field": "inputs"}
        task = job(f":{name}", source={"format": "seqio"}, validation=0.0, **options)
        prepare(task, tmp_path / name, processes=1)
        documents = PreparedDocuments(tmp_path / name, "train")
        found = [documents.read(i, 0, int(n)) for i, n in enumerate(documents.lengths)]
        # A mixture keeps its rates: it ends with the first of its tasks, here the second.
        assert set(map(tuple, wanted)) == {tuple(t.tolist()) for t, _ in found}
        assert len(found) == 20 if name == "llada2_a" else 20 < len(found) < 35
        assert all(w.tolist() == [0.0] + [1.0] * (len(w) - 1) for _, w in found)
        prepare(task, tmp_path / "again" / name, processes=1)
        assert contents(tmp_path / "again" / name) == contents(tmp_path / name)


def test_errors_of_buckets_are_storage_that_may_come_back_or_a_source_that_will_not():
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs (extra 'gcs') is not installed")
    logger = logging.getLogger("gcsfs")
    level = logger.level
    for code, kind in ((503, OSError), (429, OSError), (400, SourceError)):
        said = pytest.raises(kind, match=f"gs://b/x cannot be read: why, {code}")
        with said, paths.bucket_errors("gs://b/x"):
            assert not logger.isEnabledFor(logging.ERROR)  # its tracebacks would say it again
            raise gcsfs.retry.HttpError({"code": code, "message": "why"})
    assert logger.level == level
    with pytest.raises(SourceError, match="credentials"), paths.bucket_errors("gs://b/x"):
        raise OSError("Forbidden: gs://b/x")  # what gcsfs makes of a 403
    with pytest.raises(FileNotFoundError), paths.bucket_errors("gs://b/x"):
        raise FileNotFoundError("gs://b/x")


def test_a_folder_that_links_lead_to_is_read_once(tmp_path):
    for name in "abc":
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "x.txt").write_text(name)
        for other in "abc":
            (tmp_path / "in" / name / f"to_{other}").symlink_to(tmp_path / "in" / other)
    units = plan(SourceSpec(str(tmp_path / "in"), format="text"))
    assert [unit.files for unit in units] == [("a/x.txt", "b/x.txt", "c/x.txt")]


@pytest.mark.parametrize("kind", ["parquet", "array_record", "huggingface", "jsonl.gz"])
def test_what_storage_refuses_is_not_called_damage(kind, tmp_path, monkeypatch):
    """A file that is away, as a mount may be, once the source was planned."""
    (tmp_path / "in").mkdir()
    FORMATS[kind](tmp_path / "in", texts(9))
    spec = resolve_format(SourceSpec(str(tmp_path / "in")))
    unit = plan(spec)[0]
    if kind == "huggingface":
        refused = PermissionError(errno.EACCES, "Permission denied")
        monkeypatch.setattr("datasets.load_from_disk", lambda path: (_ for _ in ()).throw(refused))
        sources._HuggingFace._load.cache_clear()
    else:
        (tmp_path / "in").rename(tmp_path / "away")
    with pytest.raises(OSError, match="No such file|Permission denied"):
        list(read(spec, unit))
