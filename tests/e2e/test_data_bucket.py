"""`llada2 data prepare gs://…`, against a server that answers as Google's does."""

import http.server
import os
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from gcp_storage_emulator.server import create_server

from llada2_jax import data_cli
from llada2_jax.assets import TINY_AR
from llada2_jax.data.prepared import PreparedDocuments
from tests.data_helpers import texts, write_jsonl

OPTIONS = ("--tokenizer", str(TINY_AR), "--validation-percent", "0", "--processes", "1")


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


def run(source: str, out: Path, url: str) -> subprocess.CompletedProcess[str]:
    """`llada2 data prepare` in a process of its own, which takes the server for Google's."""
    env = os.environ | {
        "STORAGE_EMULATOR_HOST": url,
        # Else it asks for the kind of bucket by gRPC, which this server does not speak.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "NO_GCE_CHECK": "true",
    }
    command = [sys.executable, "-m", "llada2_jax.cli", "data", "prepare", source, str(out)]
    return subprocess.run([*command, *OPTIONS], env=env, capture_output=True, text=True)


def documents_in(out: Path) -> list[list[int]]:
    documents = PreparedDocuments(out, "train")
    lengths = enumerate(documents.lengths)
    return sorted(documents.read(i, 0, int(n))[0].tolist() for i, n in lengths)


@pytest.mark.parametrize("form", ["jsonl", "text", "parquet"])
def test_a_bucket_is_read_as_a_folder_is(storage_url, tmp_path, form):
    """Folders, and globs over compressed files; files in folders of their own."""
    local = tmp_path / "local" / "code"
    for i, text in enumerate(texts(6)):
        below = local / f"part{i % 2}"
        below.mkdir(parents=True, exist_ok=True)
        if form == "text":
            (below / f"{i}.txt").write_text(text)
        elif form == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), below / f"{i}.parquet")
        else:
            write_jsonl(local / f"{i}.jsonl.gz", [{"text": text}])
    upload(storage_url, local.parent)
    source = "gs://corpus/code" + ("/*.gz" if form == "jsonl" else "")
    assert data_cli.main(["prepare", str(local), str(tmp_path / "expected"), *OPTIONS]) == 0
    done = run(source, tmp_path / "found", storage_url)
    assert done.returncode == 0, done.stderr
    expected = documents_in(tmp_path / "expected")
    assert len(expected) == 6 and documents_in(tmp_path / "found") == expected


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server that answers nobody, with the status of its subclass."""

    status: int

    def do_GET(self):
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b'{"error": {"message": "Who are you?"}}')

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(("status", "said"), [(401, "Who are you?, 401"), (403, "Forbidden: ")])
def test_a_bucket_that_refuses_is_named_with_the_status(tmp_path, status, said):
    handler = type("Handler", (Refusing,), {"status": status})
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://localhost:{server.server_port}"
        done = run("gs://corpus/code", tmp_path / "out", url)
        server.shutdown()
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert f"error: gs://corpus/code cannot be read: {said}" in error
    assert "; check the name and your credentials" in error
    assert "Traceback" not in done.stderr
