"""``python -m benchmarks.peers``: the same student by our loop and by those of others, in turns, in one run."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from benchmarks.peers.loops import Subject
from benchmarks.peers.rounds import measure_peers
from benchmarks.peers.table import BEGIN, END, markdown, picture, rich_table, verdicts
from rpfm_edge import api
from rpfm_edge.core import artifact, files
from rpfm_edge.core.errors import RpfmError
from rpfm_edge.people.deepfashion import has_split
from rpfm_edge.people.splits import open_splits
from rpfm_edge.report.frontier import put_between

PEOPLE = Path(__file__).parents[2].parent / "shared" / "people"
BACKENDS = {"fp32": ["openvino", "onnxruntime", "torch"], "int8": ["openvino"]}


def make_bundles(student: str, data: str, steps: int, threads: int, folder: Path) -> dict[str, Path]:
    """Precision → bundle of the student, with the engines that the loops need; made once in ``folder``."""
    bundles = {}
    graph = folder / f"{steps}-fp32"
    for precision, backends in BACKENDS.items():
        bundles[precision] = folder / f"{steps}-bundle-{precision}"
        if (bundles[precision] / artifact.MANIFEST).is_file():
            continue
        if precision == "fp32":
            made = api.quantize(student, data, graph, "fp32", steps=steps).path
        else:
            made = api.quantize(graph, data, folder / f"{steps}-{precision}", precision).path
        options = {backend: {"threads": threads} for backend in backends}
        api.build(made, bundles[precision], backends, options)
    return bundles


def arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--student", default="student:xs")
    parser.add_argument("--teacher", default="teacher:xs")
    parser.add_argument("--data", default=str(PEOPLE) if has_split(PEOPLE, "test") else "sample")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60, help="in which the calls take turns")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"), help="folder of JSON, table, plot and bundles")
    parser.add_argument("--only", nargs="*", help="names of rows, to measure these alone")
    parser.add_argument("--readme", type=Path, help="text file whose lines between the markers become the table")
    return parser.parse_args()


def main() -> int:
    """Exit code 0: the targets that were measured are met, 1: one is missed, 2: a user's error."""
    given, console = arguments(), Console(highlight=False, width=140)
    try:
        if given.readme:
            put_between(given.readme.read_text(encoding="utf-8"), "", BEGIN, END)  # before anything slow
        with ExitStack() as stack, TemporaryDirectory() as cache:
            bundles = make_bundles(given.student, given.data, given.steps, given.threads, given.out / "work")
            size = tuple(artifact.load(bundles["fp32"], "bundle").config["size"])
            test = open_splits(given.data).test
            source, target = (int(index) for index in test.pairs[0])
            subject = Subject(bundles, given.teacher, test.image(source, size), given.threads, stack)
            result = measure_peers(subject, test.pose(target, size), given.rounds, given.only, cache)
            result |= {"data": given.data, "student": given.student, "steps": given.steps}
        files.write_text(given.out / "peers.json", json.dumps(result, indent=1))
        files.write_text(given.out / "peers.md", markdown(result))
        if any("frame" in row for row in result["rows"]):
            files.write_bytes(given.out / "peers.png", picture(result))
        if given.readme:
            text = given.readme.read_text(encoding="utf-8")
            files.write_text(given.readme, put_between(text, markdown(result), BEGIN, END))
    except (RpfmError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    console.print(rich_table(result))
    for text, met in (found := verdicts(result)).items():
        console.print(f"{'met' if met else 'MISSED'}: {text}", style="green" if met else "red", markup=False)
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
