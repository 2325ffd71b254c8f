"""The slices of docs/plan.md, compiled: `python docs/plan_table.py runs/plan` prints its table.

Every TPU slice of tests/goldens/plan.json goes through `llada2 plan --json`, whose answer is kept
in the folder; rows that have one there are not compiled again. --write puts the compiled bytes
into the golden file, which `make test-slow` compares two of the slices with. 2 to 5 minutes a row.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from llada2_jax.hardware import slice_named

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/goldens/plan.json"


def plan(row: dict, folder: Path) -> dict:
    """What `llada2 plan --json` says of a row."""
    answer = folder / f"{row['model']}-{row['slice']}.json"
    if not answer.exists():
        config = f"--config={ROOT}/configs/cpt_{row['model']}.py"
        command = [sys.executable, "-m", "llada2_jax.cli", "plan", "--json", config]
        command += [f"--slice={row['slice']}", *row["flags"]]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode not in (0, 3):  # 3: it does not fit
            sys.exit(f"{' '.join(command)}: exit status {done.returncode}")
        folder.mkdir(parents=True, exist_ok=True)
        answer.write_text(done.stdout)
    return json.loads(answer.read_text())


def line(row: dict, found: dict) -> str:
    """The row of the table."""
    kinds, seconds = found["bytes"], found["seconds"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    state = kinds["parameters"] + kinds["moments"]
    names = ("temporaries", "peak", "validation_peak")
    sizes = (state, *(kinds[name] for name in names), found["bytes_limit"])
    state, temporaries, peak, *others = (f"{size / 2**30:.2f}" for size in sizes)
    peak = f"**{peak}**" if found["fits"] else f"{peak}: does not fit"
    name = row["model"] + (", 32k" if found["row_length"] == 32768 else "")
    mfu = " - ".join(f"{found['mfu'][bound]:.0%}" for bound in ("in_turn", "best"))
    cells = (
        *(name, row["slice"], mesh, found["rows_per_step"], state, temporaries, peak, *others),
        f"{found['compile_seconds']:.0f} s",
        f"{seconds['best']:.2f} - {seconds['in_turn']:.2f} s",
        mfu,
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where answers are kept")
    parser.add_argument("--write", action="store_true", help="update tests/goldens/plan.json")
    args = parser.parse_args()
    rows = json.loads(GOLDEN.read_text())
    for row in rows:
        if slice_named(row["slice"]).chip.kind != "tpu":
            continue
        found = plan(row, args.folder)
        print(line(row, found), flush=True)
        names = ("temporaries", "peak", "validation_peak")
        row["compiled"] = {name: found["bytes"][name] for name in names}
    if args.write:
        GOLDEN.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
