"""The parts of the check, small ones first, and the folder that keeps what each has found.

A part is done once its file is there and was made from the same things (``key``); a failed one is tried again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rpfm_edge.core import artifact
from rpfm_edge.core.files import write_text
from scripts.gpu_parts import timing
from scripts.gpu_parts.cases import PRECISIONS, Case
from scripts.gpu_parts.table import WARMUP_ROUNDS
from scripts.gpu_parts.worker import OutOfTimeError, PartError, Worker

CLOSING_S = 20.0
LEAST_ROUNDS = 2 * WARMUP_ROUNDS + 1  # of memory, in one process
KINDS = ("build", "reference", "frame", "drift", "memory", "conformance")


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked: see ``gpu_check.py``. ``trt_python`` is None where one interpreter has both."""

    out: Path
    python: str
    trt_python: str | None
    device: str
    backend: str
    engine: Mapping[str, Any]
    contenders: tuple[str, ...]
    data: str
    pairs: int
    rounds: int
    frames: int
    memory_rounds: int
    kinds: tuple[str, ...]  # of parts, out of ``KINDS``

    @property
    def dtype(self) -> str:
        """What torch computes the frame in: as the engines, FP16 on a GPU; a CPU has no fast FP16."""
        return "float16" if self.device == "gpu" else "float32"


@dataclass
class Check:
    """The two sides, started when they are needed, and the time that is left."""

    options: Options
    end: float  # time.monotonic()
    workers: dict[str, Worker] = field(default_factory=dict)
    begun: Mapping[str, Any] = field(default_factory=dict)  # what an earlier call has found of the part under way

    @property
    def left_s(self) -> float:
        return self.end - time.monotonic()

    def side(self, name: str) -> Worker:
        """The worker of "engine" or "torch": the same one where one interpreter has both."""
        split = self.options.trt_python is not None
        key = name if split else "both"
        if key not in self.workers or not self.workers[key].alive:
            python = str(self.options.trt_python) if split and name == "engine" else self.options.python
            log = self.options.out / "log" / f"{key}.txt"
            sides = (name,) if split else ("engine", "torch")
            self.workers[key] = Worker(python, sides, log, self._environment())
        return self.workers[key]

    def ask(self, side: str, verb: str, **arguments: Any) -> dict[str, Any]:
        """Ask a side, within the time that is left."""
        return self.side(side).ask(verb, self.left_s, **arguments)

    def close(self) -> None:
        """End both sides."""
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def _environment(self) -> dict[str, str]:
        cache = self.options.out.resolve() / "cache"
        found = {"RPFM_EDGE_CACHE": str(cache / "engines"), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
        found["CUDA_MODULE_LOADING"] = "LAZY"  # TensorRT 8.6 builds several times as fast
        return found | ({"CUDA_VISIBLE_DEVICES": ""} if self.options.device == "cpu" else {})


@dataclass(frozen=True, slots=True)
class Part:
    """``measure`` returns what is kept under ``name``; ``key`` is what it depends on beside the machine."""

    name: str
    key: Callable[[], dict[str, Any]]
    measure: Callable[[Check], dict[str, Any]]

    @property
    def kind(self) -> str:
        """One of ``KINDS``."""
        return self.name.split()[0]


class Evidence:
    """One JSON file per part, written when the part is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> dict[str, dict[str, Any]]:
        """Part → its record: ``key``, and ``found`` or ``failed``."""
        files = sorted(self.folder.glob("*.json"))
        records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        return {record["part"]: record for record in records}

    def put(self, name: str, key: Mapping[str, Any], **result: Any) -> None:
        """Keep the record of a part; ``result`` is ``found=…`` or ``failed=…``."""
        record = {"part": name, "key": key, "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **result}
        write_text(self.folder / f"{name.replace(' ', '-')}.json", json.dumps(record, indent=1))


def all_parts(cases: list[Case], options: Options) -> Iterator[Part]:
    """Case by case: engines, reference, frame, drift. Then memory and the suite, which builds many small engines."""
    for case in cases:
        yield from _of_case(case, options)
    first = cases[0]
    yield Part(
        f"memory {first.name}",
        lambda: _digests(options, first) | {"rounds": options.memory_rounds},
        partial(memory, case=first),
    )
    yield Part("conformance", lambda: {"backend": options.backend}, conformance)


def _of_case(case: Case, options: Options) -> Iterator[Part]:
    name = case.name
    for precision in PRECISIONS:
        yield Part(
            f"build {name} {precision}",
            partial(_build_key, options, case, precision),
            partial(build, case=case, precision=precision),
        )
    drawn = {"data": options.data, "pairs": options.pairs}
    torch = {"dtype": options.dtype, "contenders": list(options.contenders)}
    yield Part(
        f"reference {name}",
        lambda: _origins(case) | drawn,
        lambda check: reference(check, case),
    )
    yield Part(
        f"frame {name}",
        lambda: _digests(options, case) | _origins(case) | torch | {"rounds": options.rounds, "frames": options.frames},
        lambda check: frame(check, case),
    )
    yield Part(
        f"drift {name}", lambda: _digests(options, case) | _origins(case) | drawn, lambda check: drift(check, case)
    )


def _origins(case: Case) -> dict[str, Any]:
    return {"student": _digest(case.student), "teacher": _digest(case.teacher)}


def _build_key(options: Options, case: Case, precision: str) -> dict[str, Any]:
    return {"bundle": _digest(case.bundle(precision)), "options": dict(options.engine)}


def build(check: Check, case: Case, precision: str) -> dict[str, Any]:
    """Engines of one bundle; those of a build that was cut off come out of the cache."""
    options, out = check.options, built(check.options, case, precision)
    given = {"bundle": str(case.bundle(precision)), "out": str(out)}
    return check.ask("engine", "build", **given, backend=options.backend, options=dict(options.engine))


def reference(check: Check, case: Case) -> dict[str, Any]:
    """Pairs, and what torch makes of them in FP32."""
    options, file = check.options, pairs_file(check.options, case)
    file.parent.mkdir(parents=True, exist_ok=True)
    return check.ask("torch", "reference", case=str(case.folder), data=options.data, count=options.pairs, out=str(file))


def frame(check: Check, case: Case) -> dict[str, Any]:
    """All ways to a frame in turns. Two processes take turns by rounds, the second one first in odd rounds."""
    options, pairs = check.options, str(_require(pairs_file(check.options, case)))
    opened: dict[str, Any] = {}
    try:
        for precision in _built(options, case):
            label, bundle = engine_label(options, precision), str(built(options, case, precision))
            given = {"label": label, "bundle": bundle, "backend": options.backend, "pairs": pairs}
            opened[label] = check.ask("engine", "open_engine", **given)["psnr_db"]
        given = {"case": str(case.folder), "pairs": pairs, "dtype": options.dtype}
        opened |= check.ask("torch", "open_torch", names=list(options.contenders), **given)["psnr_db"]
        sides = ["engine", "torch"] if options.trt_python else ["engine"]
        rounds: list[dict[str, list[float]]] = []
        for index in range(options.rounds):
            one: dict[str, list[float]] = {}
            for side in sides[:: -1 if index % 2 else 1]:
                one |= check.ask(side, "round", frames=options.frames)
            rounds.append(one)
    finally:
        for worker in check.workers.values():
            if worker.alive:
                with suppress(PartError, OutOfTimeError):  # they would hide why it came to this
                    worker.ask("close", CLOSING_S)
    found = {"times": timing.summary(rounds), "psnr_db": opened, "dtype": options.dtype, "processes": len(sides)}
    return found | {"host": _host_times(check, case, pairs)}


def _host_times(check: Check, case: Case, pairs: str) -> dict[str, Any]:
    if check.options.backend != "tensorrt":
        return {}
    precisions = _built(check.options, case)
    bundles = {precision: str(built(check.options, case, precision)) for precision in precisions}
    return {name: check.ask("engine", "host_time", bundle=bundle, pairs=pairs) for name, bundle in bundles.items()}


def drift(check: Check, case: Case) -> dict[str, Any]:
    """Each precision against the teacher, the ground truth and the student in FP32, picture by picture."""
    options, pairs, stages = check.options, _require(pairs_file(check.options, case)), []
    for precision in _built(options, case):
        images = str(pairs.with_name(f"{case.name}-{precision}.npz"))
        bundle = str(built(options, case, precision))
        check.ask("engine", "images", bundle=bundle, backend=options.backend, pairs=str(pairs), out=images)
        stage = {"pairs": str(pairs), "images": images, "stage": engine_label(options, precision)}
        stages.append({"precision": precision, **check.ask("torch", "judge", **stage)})
    return {"trained": case.trained, "stages": stages}


def conformance(check: Check) -> dict[str, Any]:
    """The suite of ``tests/runtimes``."""
    report = (check.options.out / "work" / "conformance.xml").resolve()
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    return check.ask("engine", "conformance", backend=check.options.backend, report=str(report))


def memory(check: Check, case: Case) -> dict[str, Any]:
    """Open, prepare, render, close, many times, in a process of its own. A later call goes on, in another process:
    ``calls`` are the rounds of each; one too short to tell growth from the first rounds is left out.
    """
    options, pairs = check.options, str(_require(pairs_file(check.options, case)))
    precision = _built(options, case)[0]
    check.close()
    given = {"bundle": str(built(options, case, precision)), "backend": options.backend, "pairs": pairs}
    seconds = max(check.left_s - 15, 1.0)  # to come back and be kept
    before = {"host_bytes": [], "gpu_bytes": [], "calls": [], **check.begun}
    count = max(options.memory_rounds - sum(before["calls"]), LEAST_ROUNDS)
    found = check.ask("engine", "memory_rounds", **given, count=count, seconds=seconds)
    found["calls"] = [len(found["host_bytes"])]
    if found["calls"][0] < LEAST_ROUNDS:
        found = {name: [] for name in found}
    whole = {name: [*before[name], *values] for name, values in found.items()}
    return {"precision": precision, "complete": sum(whole["calls"]) >= options.memory_rounds, **whole}


def engine_label(options: Options, precision: str) -> str:
    """How tables name an engine."""
    return f"{options.backend} {precision}"


def built(options: Options, case: Case, precision: str) -> Path:
    """The bundle with engines."""
    return options.out / "bundles" / f"{case.name}-{precision}"


def pairs_file(options: Options, case: Case) -> Path:
    """The pairs and torch's pictures of a case."""
    return options.out / "work" / f"{case.name}.npz"


def _built(options: Options, case: Case) -> list[str]:
    found = [name for name in PRECISIONS if (built(options, case, name) / artifact.MANIFEST).is_file()]
    if not found:
        raise PartError(f"no engine of {case.name} was built")
    return found


def _require(file: Path) -> Path:
    if not file.is_file():
        raise PartError(f"{file} is missing, because its part failed")
    return file


def _digest(folder: Path) -> str | None:
    return artifact.load(folder, verify=False).digest if (folder / artifact.MANIFEST).is_file() else None


def _digests(options: Options, case: Case) -> dict[str, Any]:
    return {"bundles": {name: _digest(built(options, case, name)) for name in PRECISIONS}}
