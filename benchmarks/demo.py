"""``python -m benchmarks.demo``: how long ``make demo`` takes in a fresh clone of HEAD, and how long a second time."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rpfm_edge.measure.machine import where

ROOT = Path(__file__).parent.parent
FIRST_S, SECOND_S = 480.0, 30.0  # targets


def timed_demo(checkout: Path) -> float:
    """Seconds that ``make demo`` took; its output goes to standard error."""
    start = time.perf_counter()
    subprocess.run(["make", "demo"], cwd=checkout, stdout=sys.stderr, check=True)
    return time.perf_counter() - start


def main() -> int:
    """Exit code 0: both targets met, 1: one missed, 2: ``make demo`` failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the clone goes and stays; default: a temporary folder")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory(prefix="rpfm-edge-demo-") as scratch:
        checkout = (folder or Path(scratch)) / "checkout"
        try:
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
            commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=checkout, text=True).strip()
            times = {"first": timed_demo(checkout), "second": timed_demo(checkout)}
        except subprocess.CalledProcessError as error:
            print(f"{' '.join(error.cmd)} failed with exit code {error.returncode}", file=sys.stderr)
            return 2
    machine, targets = where(), {"first": FIRST_S, "second": SECOND_S}
    met = {run: times[run] <= targets[run] for run in times}
    print(f"make demo, {commit[:12]}, on {machine['cpu']}, {machine['usable_cores']} of {machine['cores']} cores")
    for run, seconds in times.items():
        print(f"{run:>6} run {seconds:7.1f} s, target {targets[run]:3.0f} s: {'met' if met[run] else 'MISSED'}")
    print(json.dumps({"commit": commit, "times_s": times, "targets_s": targets, "met": met, "machine": machine}))
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
