"""constraints.txt pins all that pyproject.toml asks for, and names no place to get it from."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    for line in pinned:
        assert re.fullmatch(r"[\w.-]+==[\w.+!]+", line), f"not a plain name==version: {line}"
    return {canonicalize_name(n): v for n, v in (line.split("==") for line in pinned)}


def test_the_oldest_jax_is_tested() -> None:
    """`make test-oldest` takes the lower bound that pyproject.toml promises."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {r.name: str(r.specifier) for r in map(Requirement, project["dependencies"])}
    text = (ROOT / "constraints-oldest.txt").read_text()
    oldest = dict(re.findall(r"^([\w-]+)==([\w.]+)$", text, re.MULTILINE))
    assert bounds["jax"] == f">={oldest['jax']}" and oldest["jax"] == oldest["jaxlib"]


def test_every_requirement_is_pinned_within_its_bounds(pins: dict[str, str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["dev"],
    ]
    for requirement in map(Requirement, wanted):
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement
