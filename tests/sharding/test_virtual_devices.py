"""Each checks_*.py of this folder, as pytest runs it in a process of its own that has 8 devices.

One of them alone: JAX_NUM_CPU_DEVICES=8 python -m pytest tests/sharding/checks_mesh.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("checks", sorted(FOLDER.glob("checks_*.py")), ids=lambda path: path.stem)
def test_on_8_devices(checks):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    env = {name: value for name, value in env.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", str(checks)]
    done = subprocess.run(
        command, cwd=FOLDER.parents[1], env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
