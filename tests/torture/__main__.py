"""Tortures training runs, and checks that nothing of it shows in the end.

    python -m tests.torture --faults 1000 --out runs/torture

A run, two of whose 60 steps are bad and rolled back, is killed (-9), preempted (SIGTERM, once or
twice), starved of disk space, deprived of its folder for a while, and handed a newest checkpoint
that is flipped, cut or partly deleted, at random moments and in random combinations, until it is
done. Then its metrics must be equal, bit for bit, to those of an undisturbed run, each document
must have been trained on exactly as often, and the last checkpoint must hold the same state. Runs
follow each other until there were enough faults. Each is drawn from (seed, steps, number of the
run), its result is a line of results.jsonl, and the same command goes on after the last of them.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

from llada2_jax.checkpoint import read_checksums
from llada2_jax.metrics import read_metrics
from llada2_jax.preemption import KILLED, RESTART
from tests.torture import life

CLOCKS = {"seconds", "tokens_per_second", "input_wait_fraction"}
PATIENCE = 600.0  # seconds; a life that lasts longer hangs
ENDS = {  # how a life may end after each fault; 0: it was done before
    "kill -9": {-signal.SIGKILL, 0},
    "SIGTERM": {RESTART, -signal.SIGTERM, 0},  # -SIGTERM: before training listened
    "SIGTERM twice": {RESTART, KILLED, -signal.SIGTERM, 0},
}
DAMAGES = ("flipped bit", "cut file", "deleted file")


class Tortured(AssertionError):
    """The run did not come through; the message says how, and how to see it again."""


@dataclasses.dataclass
class Lineage:
    """One run, over all its lives. seen: what each surviving step trained on."""

    folder: Path
    workdir: Path
    rng: random.Random
    steps: int = life.STEPS
    faults: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    seen: dict[int, list] = dataclasses.field(default_factory=dict)
    lives: int = 0

    # ---- one life --------------------------------------------------------------------------------

    def run(self, *, disturbed: bool) -> None:
        """Lives until the run is done."""
        done = False
        while not done:
            plan = self._plan() if disturbed else []
            done = self._live(plan)
            if not done and self.rng.random() < 0.4:
                self._damage_newest()

    def _plan(self) -> list[tuple[int, float, str]]:
        """(after how many steps of the life, and then how many seconds, what): the end is last.

        -1: since the process was started. 0: since it has found its run, and begins to restore.
        """
        rng = self.rng
        steps = -1 if rng.random() < 0.15 else rng.randint(1, 16)
        delay = rng.uniform(0, 3) if steps < 0 else rng.uniform(0, 0.1)
        plan = [(steps, delay, rng.choice(list(ENDS)))]
        for _ in range(rng.randint(0, 2)):
            what = rng.choice(["disk full", "folder gone"])
            at = 0 if rng.random() < 0.3 else rng.randint(1, max(steps, 1))
            plan.append((at, 0.0, what))
        return sorted(plan, key=lambda event: event[:2])

    def _live(self, plan: list[tuple[int, float, str]]) -> bool:
        """Starts the run and does to it what is planned; whether it came to its end."""
        self.lives += 1
        context = multiprocessing.get_context("forkserver")
        reader, writer = context.Pipe(duplex=False)
        args = (self.folder, self.workdir, self.steps, writer)
        process = context.Process(target=life.live, args=args)
        process.start()
        writer.close()
        steps, allowed, give_up = -1, {0}, time.monotonic() + PATIENCE
        while process.is_alive():
            steps += self._listen(reader, 0.01)
            if plan and steps >= plan[0][0] and process.is_alive():
                _, delay, what = plan.pop(0)
                time.sleep(delay)
                self.faults[what] += self._inflict(what, process.pid)
                allowed = ENDS.get(what, allowed)
            if time.monotonic() > give_up:
                process.kill()
                raise Tortured(f"no end after {PATIENCE:g} s; {self._trace()}")
        self._listen(reader, 0)
        if process.exitcode not in allowed:
            raise Tortured(f"exit status {process.exitcode}, not {allowed}; {self._trace()}")
        return process.exitcode == 0

    def _listen(self, reader, seconds: float) -> int:
        """How often the life has told of something: that it restores, or a step and its documents,
        which replace those of the same step taken earlier."""
        count = 0
        with contextlib.suppress(EOFError, OSError):
            while reader.poll(0 if count else seconds):
                told = reader.recv()
                self.seen |= {told[0]: told[1]} if told else {}
                count += 1
        return count

    def _trace(self) -> str:
        tail = Path(f"{self.workdir}.log").read_text(errors="replace")[-3000:]
        return f"{self.workdir}, life {self.lives}, {dict(self.faults)}:\n{tail}"

    # ---- faults ----------------------------------------------------------------------------------

    def _inflict(self, what: str, pid: int) -> bool:
        """Whether there was still something to do it to."""
        with contextlib.suppress(ProcessLookupError):
            if what == "kill -9":
                os.kill(pid, signal.SIGKILL)
            elif what == "disk full":
                self._fill_disk(pid)
            elif what == "folder gone":
                return self._hide_folder()
            else:
                os.kill(pid, signal.SIGTERM)
                if what == "SIGTERM twice":
                    time.sleep(self.rng.uniform(0, 0.1))
                    os.kill(pid, signal.SIGTERM)
            return True
        return False

    def _fill_disk(self, pid: int) -> None:
        """No file of the process may grow: all of its writes fail (EFBIG)."""
        free = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, free[1]))
        time.sleep(self.rng.uniform(0.02, 0.4))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, free)

    def _hide_folder(self) -> bool:
        """As a mount that goes and comes back: what is written in between is under it. Whether
        there was a folder yet."""
        away = self.workdir.with_name(f"{self.workdir.name}.away")
        try:
            self.workdir.rename(away)
        except FileNotFoundError:
            return False
        time.sleep(self.rng.uniform(0.02, 0.4))
        while away.exists():
            shutil.rmtree(self.workdir, ignore_errors=True)
            with contextlib.suppress(OSError):
                away.rename(self.workdir)
        return True

    def _damage_newest(self) -> None:
        """Damages a random file of the newest checkpoint, if there is another one."""
        steps = [p for p in (self.workdir / "checkpoints").glob("*") if p.name.isdecimal()]
        if len(steps) < 2:
            return
        newest = max(steps, key=lambda p: int(p.name))
        files = sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size)
        file, what = self.rng.choice(files), self.rng.choice(DAMAGES)
        data = bytearray(file.read_bytes())
        if what == "deleted file":
            file.unlink()
        elif what == "cut file":
            file.write_bytes(data[: self.rng.randrange(len(data))])
        else:
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
            file.write_bytes(data)
        self.faults[what] += 1

    # ---- what came of it -------------------------------------------------------------------------

    def history(self) -> list[dict]:
        """All metrics but the clocks', as written: floats in JSON are exact."""
        lines = read_metrics(self.workdir)
        return [{k: v for k, v in x.items() if k not in CLOCKS} for x in lines]

    def tokens_seen(self) -> dict[tuple[int, int], int]:
        """{(document, visit): tokens trained on}, over the surviving steps."""
        total = collections.Counter()
        for documents in self.seen.values():
            for document, visit, tokens in documents:
                total[document, visit] += tokens
        return dict(total)

    def state(self) -> dict[str, int]:
        """Checksums of all arrays of the last checkpoint, moments and counters included."""
        sums = read_checksums(self.workdir / "checkpoints" / str(self.steps))
        return {k: v for k, v in sums.items() if "/" in k}

    def check_against(self, undisturbed: "Lineage") -> None:
        for what in (Lineage.history, Lineage.tokens_seen, Lineage.state):
            if what(self) != what(undisturbed):
                raise Tortured(f"another {what.__name__} than the undisturbed run; {self._trace()}")


def torture(out: Path, faults: int, seed: int, steps: int) -> None:
    """Runs and checks runs of `steps` steps until `faults` faults have been survived.

    Raises: Tortured.
    """
    folder = out / "shared"
    folder.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    past = [json.loads(x) for x in results.read_text().splitlines()] if results.exists() else []
    survived = sum(sum(r["faults"].values()) for r in past)
    if survived >= faults:
        return
    undisturbed = _fresh(folder, out / "undisturbed", random.Random(seed), steps)
    undisturbed.run(disturbed=False)
    number = len(past)
    while survived < faults:
        start = time.monotonic()
        lineage = _fresh(folder, out / f"run-{number}", random.Random(f"{seed}/{number}"), steps)
        lineage.run(disturbed=True)
        lineage.check_against(undisturbed)
        seconds = time.monotonic() - start
        survived += lineage.faults.total()
        result = {
            "seed": seed,
            "steps": steps,
            "run": number,
            "lives": lineage.lives,
            "seconds": round(seconds, 1),
            "faults": dict(lineage.faults),
        }
        with results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{survived} faults survived; {json.dumps(result)}", flush=True)
        _remove(lineage.workdir)
        number += 1


def summary(out: Path) -> str:
    """What results.jsonl adds up to."""
    lines = [json.loads(x) for x in (out / "results.jsonl").read_text().splitlines()]
    kinds = sum((collections.Counter(x["faults"]) for x in lines), collections.Counter())
    seconds, lives = sum(x["seconds"] for x in lines), sum(x["lives"] for x in lines)
    parts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return (
        f"{kinds.total()} faults ({parts}) in {len(lines)} runs and {lives} lives, all equal to "
        f"the undisturbed run; {seconds:.0f} s, {seconds / max(kinds.total(), 1):.2f} s a fault"
    )


def _fresh(folder: Path, workdir: Path, rng: random.Random, steps: int) -> Lineage:
    _remove(workdir)
    return Lineage(folder, workdir, rng, steps)


def _remove(workdir: Path) -> None:
    for path in workdir.parent.glob(f"{workdir.name}*"):
        if path.name == workdir.name or path.name.startswith(f"{workdir.name}."):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> int:
    p = argparse.ArgumentParser(
        prog="python -m tests.torture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--faults", type=int, default=1000, help="how many to survive (default: 1000)")
    p.add_argument("--seed", type=int, default=0, help="default: 0")
    p.add_argument("--steps", type=int, default=life.STEPS, help="of a run (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("runs/torture"), help="default: runs/torture")
    args = p.parse_args()
    # One thread in the fork server: a fork copies no other.
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.torture.life"])
    try:
        torture(args.out.absolute(), args.faults, args.seed, args.steps)
    except Tortured as error:
        print(f"seed {args.seed}, steps {args.steps}: {error}", file=sys.stderr)
        return 1
    print(summary(args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
