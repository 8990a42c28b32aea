"""The proof on a GPU: engines, conformance, drift and the frame of TensorRT beside torch's, with the evidence.

    python scripts/gpu_check.py prepare --out FOLDER                     # anywhere with torch, onnx and nncf
    python scripts/gpu_check.py --out FOLDER [--trt-python PYTHON]       # on the GPU; again, until it says "done"

See docs/gpu_check.md. Exit code: 0 all measured and met, 1 a part failed or a target was missed, 2 the user's fault, 3
out of time: run it again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CASES = ("xs=student:xs,teacher:xs", "s")
WAYS = ("eager", "eager+graph", "compile", "compile+graph", "teacher")  # to a frame in torch
LEAST_S = 3.0  # with less left no part is begun


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("command", nargs="?", default="run", choices=("run", "prepare", "worker"))
    made.add_argument("--out", type=Path, help="the folder of everything; prepared cases lie in its prepared/")
    made.add_argument("--data", default="sample", help="data set of calibration and drift")
    made.add_argument("--cases", nargs="+", default=DEFAULT_CASES, help="prepare: NAME=STUDENT,TEACHER, or a preset")
    made.add_argument("--steps", type=int, default=1, help="prepare: steps of the frame")
    made.add_argument("--bundles", nargs="+", type=Path, help="run: prepared cases; default: all of OUT/prepared")
    made.add_argument("--seconds", type=float, default=500.0, help="run: stop by then")
    made.add_argument("--trt-python", help="run: the interpreter that has TensorRT, if this one has not")
    made.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    made.add_argument("--backend", help="default: tensorrt; on a CPU onnxruntime stands in for it")
    made.add_argument("--level", type=int, help="builder_optimization_level of TensorRT; lower builds faster")
    made.add_argument("--torch", nargs="+", dest="contenders", help="frames in torch; default: all that the device has")
    made.add_argument("--only", nargs="+", help="run: these kinds of parts; default: all")
    made.add_argument("--pairs", type=int, default=16, help="held-out pairs of the drift")
    made.add_argument("--rounds", type=int, default=15, help="rounds in which the two processes take turns")
    made.add_argument("--frames", type=int, default=40, help="frames of each way in a round")
    made.add_argument("--memory-rounds", type=int, default=1000, help="rounds of open, prepare, render, close")
    made.add_argument("--sides", nargs="+", default=(), help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    if str(ROOT) not in sys.path:  # as a file, from a checkout that is not installed
        sys.path.insert(0, str(ROOT))
    from rpfm_edge.core.errors import RpfmError

    given = parser().parse_args(arguments)
    if given.command == "worker":
        from scripts.gpu_parts.worker import SIDES, serve

        serve({name: verb for side in given.sides for name, verb in import_module(SIDES[side]).VERBS.items()})
        return 0
    try:
        return prepare(given) if given.command == "prepare" else run(given)
    except RpfmError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2


def _out(given: argparse.Namespace) -> Path:
    from rpfm_edge.core.errors import ConfigError

    if given.out is None:
        raise ConfigError("no folder", expected="--out FOLDER", fix="give one")
    return Path(given.out)


def prepare(given: argparse.Namespace) -> int:
    """Make the cases."""
    from scripts.gpu_parts.cases import prepare as prepare_case

    for spec in given.cases:
        case = prepare_case(spec, _out(given) / "prepared", given.data, given.steps)
        size = sum(file.stat().st_size for file in case.folder.rglob("*") if file.is_file())
        print(f"{case.folder}: {case.name}, {size / 2**20:.0f} MiB")
    return 0


def options_of(given: argparse.Namespace) -> Any:
    """``parts.Options`` of the command line; raises ``ConfigError``."""
    from rpfm_edge.core.errors import ConfigError
    from scripts.gpu_parts.parts import KINDS, Options

    possible = WAYS if given.device == "gpu" else tuple(name for name in WAYS if "+" not in name)
    contenders = _some_of(f"--torch on a {given.device}", given.contenders, possible)
    if min(given.rounds, given.frames, given.pairs, given.memory_rounds) < 1:
        raise ConfigError("a count below 1", expected="rounds, frames and pairs of at least 1", fix="ask for more")
    backend = given.backend or ("tensorrt" if given.device == "gpu" else "onnxruntime")
    return Options(
        out=_out(given),
        python=sys.executable,
        trt_python=given.trt_python,
        device=given.device,
        backend=backend,
        engine={} if given.level is None or backend != "tensorrt" else {"optimization_level": given.level},
        contenders=contenders,
        data=given.data,
        pairs=given.pairs,
        rounds=given.rounds,
        frames=given.frames,
        memory_rounds=given.memory_rounds,
        kinds=_some_of("--only", given.only, KINDS),
    )


def _some_of(option: str, names: Sequence[str] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    from rpfm_edge.core.errors import ConfigError

    for name in names or ():
        if name not in known:
            raise ConfigError(f"{option}: {name!r}", expected=f"some of {list(known)}", fix="check the spelling")
    return tuple(names or known)


def run(given: argparse.Namespace) -> int:
    """Measure what is missing, until the time is over."""
    from scripts.gpu_parts.cases import read_case
    from scripts.gpu_parts.parts import Check, Evidence, all_parts
    from scripts.gpu_parts.worker import OutOfTimeError, PartError

    options = options_of(given)
    cases = [read_case(folder) for folder in given.bundles or sorted((options.out / "prepared").glob("[!.]*"))]
    if not cases:
        read_case(options.out / "prepared")  # says what is missing
    cases.sort(key=lambda case: (case.name != "xs", case.name))
    check, evidence = Check(options, time.monotonic() + given.seconds), Evidence(options.out / "parts")
    parts = list(all_parts(cases, options))
    late = False
    try:
        machine = {side: check.ask(side, f"{side}_machine", **_backend(side, options)) for side in ("engine", "torch")}
        evidence.put("machine", {}, found=machine)
        here = {side: (found["gpu"], found["machine"]["versions"]) for side, found in machine.items()}
        before = evidence.read()
        chosen = [part for part in parts if part.kind in options.kinds]
        chosen.sort(key=lambda part: "failed" in before.get(part.name, {}))  # what failed is tried again last of all
        for part in chosen:
            _measure(part, check, evidence, here)
            _conclude(evidence, parts, options)
    except OutOfTimeError:
        late = True
    except PartError as error:  # of the machine: nothing can be measured here
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    finally:
        check.close()
    return _conclude(evidence, parts, options, late, say=True)


def _backend(side: str, options: Any) -> dict[str, str]:
    return {"backend": options.backend} if side == "engine" else {}


def _measure(part: Any, check: Any, evidence: Any, here: dict[str, Any]) -> None:
    """One part, unless it is known; its failure is kept too."""
    from scripts.gpu_parts.table import key_of
    from scripts.gpu_parts.worker import OutOfTimeError, PartError

    key, known = part.key() | {"machine": here}, evidence.read().get(part.name, {})
    same = bool(known) and key_of(known["key"]) == key_of(key)
    if same and known.get("found", {"complete": False}).get("complete", True):
        return
    check.begun = known.get("found", {}) if same else {}
    if check.left_s < LEAST_S:
        raise OutOfTimeError
    start = time.monotonic()
    try:
        evidence.put(part.name, key, found=part.measure(check))
        print(f"{part.name}: {time.monotonic() - start:.1f} s", flush=True)
    except PartError as error:
        evidence.put(part.name, key, failed=str(error))
        print(f"{part.name}: failed, {error}", flush=True)


def _conclude(evidence: Any, parts: Sequence[Any], options: Any, late: bool = False, say: bool = False) -> int:
    """Write ``evidence.json`` and ``table.md``; returns the exit code."""
    from rpfm_edge.core.files import write_text
    from scripts.gpu_parts.table import markdown, verdicts

    records = evidence.read()
    wanted = {name: records[name] for name in ("machine", *(part.name for part in parts)) if name in records}
    missing = [part.name for part in parts if part.name not in wanted]
    found = {name: record["found"] for name, record in wanted.items() if "found" in record}
    due = [part.name for part in parts if part.kind in options.kinds]
    late = late or not all(found.get(name, {}).get("complete", True) for name in due)
    judged = verdicts(found) if options.device == "gpu" else []
    evidence_json = {
        "device": options.device,
        "backend": options.backend,
        "parts": wanted,
        "verdicts": [{"target": one.target, "measured": one.measured, "met": one.met} for one in judged],
    }
    write_text(options.out / "evidence.json", json.dumps(evidence_json, indent=1))
    write_text(options.out / "table.md", markdown(wanted, options.device, options.backend, missing))
    failed = [name for name, record in wanted.items() if "failed" in record]
    missed = [one.target for one in judged if not one.met]
    if say:
        print(f"{'out of time, run it again' if late else 'done'}: {options.out / 'table.md'}")
        for text in missed:
            print(f"missed: {text}")
    return 3 if late else 1 if failed or missed else 0


if __name__ == "__main__":
    sys.exit(main())
