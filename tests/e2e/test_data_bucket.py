"""`llada2 data prepare gs://…`, against a server that answers as Google's does."""

import os
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from gcp_storage_emulator.server import create_server

from llada2_jax.assets import TINY_AR
from llada2_jax.data.prepared import PreparedDocuments
from tests.data_helpers import texts, write_jsonl


@pytest.fixture
def storage_url():
    """Of a server with one empty bucket, "corpus"."""
    server = create_server("localhost", 0, in_memory=True, default_bucket="corpus")
    server.start()
    yield f"http://localhost:{server._api._httpd.server_port}"
    server.stop()


def upload(url: str, folder: Path) -> None:
    for path in (p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        request = urllib.request.Request(
            f"{url}/upload/storage/v1/b/corpus/o?{query}", path.read_bytes(), method="POST"
        )
        urllib.request.urlopen(request).close()


def prepared(source: str, out: Path, url: str) -> list[list[int]]:
    """The documents that a process of its own makes of the source."""
    env = os.environ | {
        "STORAGE_EMULATOR_HOST": url,
        # Else it asks for the kind of bucket by gRPC, which this server does not speak.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "NO_GCE_CHECK": "true",
    }
    command = [sys.executable, "-m", "llada2_jax.cli", "data", "prepare", source, str(out)]
    command += ["--tokenizer", str(TINY_AR), "--validation-percent", "0", "--processes", "1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    documents = PreparedDocuments(out, "train")
    lengths = enumerate(documents.lengths)
    return sorted(documents.read(i, 0, int(n))[0].tolist() for i, n in lengths)


@pytest.mark.parametrize("form", ["jsonl", "text"])
def test_a_bucket_is_read_as_a_folder_is(storage_url, tmp_path, form):
    """Folders, and globs over compressed files; text files in folders of their own."""
    local = tmp_path / "local" / "code"
    for i, text in enumerate(texts(6)):
        below = local / f"part{i % 2}"
        below.mkdir(parents=True, exist_ok=True)
        if form == "text":
            (below / f"{i}.txt").write_text(text)
        else:
            write_jsonl(local / f"{i}.jsonl.gz", [{"text": text}])
    upload(storage_url, local.parent)
    source = "gs://corpus/code" + ("/*.gz" if form == "jsonl" else "")
    expected = prepared(f"{local}", tmp_path / "expected", storage_url)
    assert len(expected) == 6
    assert prepared(source, tmp_path / "found", storage_url) == expected
