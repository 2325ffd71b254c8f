"""The wheel that users install: both packages are in it, and nothing that is not theirs."""

import configparser
import email
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest

import llada2_jax

ROOT = Path(__file__).parents[2]
PACKAGES = ("llada2_jax", "pallas_kernels")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The project's wheel, built offline with the build backend of this environment."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def dist_info(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (p for p in wheel.namelist() if p.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_every_module_of_both_packages_is_shipped(wheel: zipfile.ZipFile) -> None:
    shipped = {path for path in wheel.namelist() if path.endswith(".py")}
    for package in PACKAGES:
        here = {p.relative_to(ROOT).as_posix() for p in (ROOT / package).rglob("*.py")}
        assert here, f"{package}/ has no modules"
        assert here <= shipped, f"not in the wheel: {sorted(here - shipped)}"


@pytest.mark.parametrize(
    "module",
    [
        "llada2_jax/cli.py",
        "llada2_jax/model/transformer.py",
        "llada2_jax/sampler.py",
        "pallas_kernels/block_layout.py",
    ],
)
def test_key_modules_are_not_empty(wheel: zipfile.ZipFile, module: str) -> None:
    assert wheel.getinfo(module).file_size > 0


def test_nothing_else_is_shipped(wheel: zipfile.ZipFile) -> None:
    tops = {PurePosixPath(path).parts[0] for path in wheel.namelist()}
    others = {top for top in tops if top not in PACKAGES}
    assert {top.endswith(".dist-info") for top in others} == {True}, others
    assert not [path for path in wheel.namelist() if "__pycache__" in path]


def test_entry_point(wheel: zipfile.ZipFile) -> None:
    parser = configparser.ConfigParser()
    parser.read_string(dist_info(wheel, "entry_points.txt"))
    assert dict(parser["console_scripts"]) == {"llada2": "llada2_jax.cli:main"}


def test_metadata(wheel: zipfile.ZipFile) -> None:
    metadata = email.message_from_string(dist_info(wheel, "METADATA"))
    assert metadata["Name"] == "llada2-jax"
    assert metadata["Version"] == llada2_jax.__version__  # which `llada2 --version` prints
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in dist_info(wheel, "licenses/LICENSE")
    assert {"tpu", "cuda12", "cuda13", "dev"} <= set(metadata.get_all("Provides-Extra", []))
