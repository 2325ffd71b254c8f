"""The checks_*.py of this folder, as pytest runs them in a process of its own that has 8 devices.

Some of them alone: JAX_NUM_CPU_DEVICES=8 python -m pytest tests/sharding/checks_mesh.py
"""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def test_on_8_devices():
    checks = sorted(str(path) for path in FOLDER.glob("checks_*.py"))
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    env = {name: value for name, value in env.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", *checks]
    done = subprocess.run(
        command, cwd=FOLDER.parents[1], env=env, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
