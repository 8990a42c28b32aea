"""The command line: parses, calls ``rpfm_edge.api`` and prints. Exit codes: 0 good, 1 over the drift budget or slower
than allowed, 2 an error, 3 no baseline, 4 unstable, 130 interrupted, 143 terminated."""

from __future__ import annotations

import errno
import io
import json
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from rpfm_edge import api
from rpfm_edge.core.errors import ConfigError, RpfmError
from rpfm_edge.core.files import finite
from rpfm_edge.judge.baseline import FOLDER
from rpfm_edge.live.command import live
from rpfm_edge.measure.verdict import parse_share
from rpfm_edge.report import gate as gate_table
from rpfm_edge.report import tables
from rpfm_edge.report.tables import rows
from rpfm_edge.search.planner import work_folder


def judge(
    bundle: str,
    save: str | None,
    gate: str | None,
    against: str | None,
    max_slowdown: str,
    backend: str | None,
    baselines: Path,
    **counts: Any,
) -> dict[str, Any]:
    """What the options of ``bench`` ask for; one of ``save``, ``gate`` and ``against`` has to be given."""
    given = [f"--{name}" for name, value in (("save", save), ("gate", gate), ("against", against)) if value]
    if len(given) != 1:
        raise ConfigError(
            f"{' and '.join(given)} at once", expected="one of them", fix="run the gate first, and save when it passed"
        )
    counts["max_slowdown"] = parse_share(max_slowdown)
    if save:
        return api.save_baseline(bundle, save, backend, baselines, **counts)
    return api.gate(bundle, gate, against, backend, baselines, **counts)


def show_bench(
    bundle: str | Path, backend: str | None, with_stages: bool, rounds: int, minutes: float, out: Path
) -> dict[str, Any]:
    """What was asked for, measured and printed; ``minutes`` 0: no sustained run."""
    found: dict[str, Any] = {}
    if with_stages:
        found["stages"] = api.stages(bundle, backend, rounds)
        tables.print_stages(found["stages"])
    if minutes:
        found["sustained"] = api.sustained(bundle, minutes, out, backend)
        tables.print_sustained(found["sustained"])
        missing = found["sustained"].get("no_plot")
        plot = f"; no plot: {missing}" if missing else f" and {out / 'sustained.png'}"
        tables.say(f"wrote {out / 'sustained.json'}{plot}")
    return found


WORDS = {"true": True, "false": False}


def parse_options(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Backend → name → value. ``true``, ``false`` and integers are taken for what they look like, all else is text;
    the backend checks names and types.

    Raises:
        ConfigError: an entry of another form.
    """
    options: dict[str, dict[str, Any]] = {}
    for entry in given:
        place, equals, text = entry.partition("=")
        backend, dot, name = place.partition(".")
        if not (equals and dot and backend and name):
            raise ConfigError(
                f"option {entry!r}",
                expected="BACKEND.NAME=VALUE, such as tensorrt.workspace_mib=1024",
                fix="correct it",
            )
        number = int(text) if text.removeprefix("-").isdecimal() else text
        options.setdefault(backend, {})[name] = WORDS.get(text, number)
    return options


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distill, quantize and deploy RPFM.",
)
console = tables.console
SIGNALS = {130: "interrupted", 143: "terminated"}  # exit codes that a shell reports too
FIXES = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space", errno.EFBIG: "raise the limit of file sizes"}

Data = Annotated[str, typer.Option(help="Root of a data set in one of DeepFashion's layouts, or 'sample'.")]
Out = Annotated[Path, typer.Option(help="Where to write the result.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every draw.")]
Backend = Annotated[str | None, typer.Option(help="One of the bundle's backends; default: all, or the first.")]


@app.command()
def doctor(
    precision: Annotated[str | None, typer.Option(help="Also say if a Jetson's GPU lacks it, such as fp8.")] = None,
    json: Json = False,
) -> None:
    """Say what is installed, which backends work, and what to do about those that do not."""
    from rpfm_edge import doctor as module

    diagnosis = api.doctor(precision)
    _finish(diagnosis) if json else module.render(diagnosis)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A preset (xs, s, b, l) or a TOML file.")],
    data: Data,
    out: Out,
    seconds: Annotated[float | None, typer.Option(help="Training time of the flow network.")] = None,
    autoencoder_seconds: Annotated[float | None, typer.Option(help="Training time of the autoencoder.")] = None,
    alignment_seconds: Annotated[float | None, typer.Option(help="Training time of the alignment.")] = None,
    decoder_seconds: Annotated[float | None, typer.Option(help="Training time of the aligned decoder.")] = None,
    autoencoder: Annotated[
        str | None, typer.Option(help="'small', or the folder of a diffusers AutoencoderKL.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of every draw; default: the file's, or 0.")] = None,
    json: Json = False,
) -> None:
    """Train an RPFM teacher."""
    changes = {
        "seconds": seconds,
        "autoencoder_seconds": autoencoder_seconds,
        "alignment_seconds": alignment_seconds,
        "decoder_seconds": decoder_seconds,
        "autoencoder": autoencoder,
        "seed": seed,
    }
    _made(api.train(config, data, out, **changes), json)


@app.command()
def distill(
    teacher: Annotated[
        str, typer.Argument(help="A path, a shipped name (teacher:xs) or package.module:factory; with qad a student.")
    ],
    data: Data,
    out: Out,
    method: Annotated[str, typer.Option(help="reflow, flowmap or endpoint; qad to fine-tune a student.")] = "flowmap",
    precision: Annotated[str | None, typer.Option(help="That qad is for: int8 (default) or int4-weights.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of the student; default: 4, with qad the student's.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Training time.")] = None,
    trajectories: Annotated[int | None, typer.Option(help="Teacher paths to solve first.")] = None,
    store_seconds: Annotated[float | None, typer.Option(help="Stop solving paths after this time.")] = None,
    preset: Annotated[str | None, typer.Option(help="Student's architecture if the teacher is no RPFM.")] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Distill a teacher to few steps, guidance folded in; or fine-tune a student for a precision (--method qad)."""
    changes = {
        "method": method,
        "precision": precision,
        "steps": steps,
        "seconds": seconds,
        "trajectories": trajectories,
        "store_seconds": store_seconds,
        "preset": preset,
        "seed": seed,
    }
    _made(api.distill(teacher, data, out, **changes), json)


@app.command()
def quantize(
    student: Annotated[str, typer.Argument(help="A student (path or student:xs) or a float graph.")],
    out: Out,
    data: Annotated[str | None, typer.Option(help="As of distill; only auto, int8, fp8 and nvfp4 need it.")] = None,
    precision: Annotated[
        str, typer.Option(help="auto, fp32, fp16, int8, int8-weights, int4-weights; TensorRT only: fp8, nvfp4.")
    ] = "int8",
    steps: Annotated[int | None, typer.Option(help="Steps to unroll; default: the student's.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 64,
    method: Annotated[str, typer.Option(help="Of int8: ptq, sweep or accuracy-control.")] = "ptq",
    least_psnr: Annotated[float | None, typer.Option(help="dB that accuracy-control keeps; default: 48.")] = None,
    target: Annotated[str | None, typer.Option(help="Of auto: the backend that has to be fast, here.")] = None,
    budget: Annotated[Path | None, typer.Option(help="Of auto: TOML file with a table \\[drift].")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Of auto: units that stay float, such as block0.*")] = None,
    pairs: Annotated[int | None, typer.Option(help="Of auto: validation pairs; default: 24.")] = None,
    points: Annotated[int | None, typer.Option(help="Of auto: candidates at even distances; default: 8.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Of auto: BACKEND.NAME=VALUE of the target.")] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Export a student to ONNX and quantize it; auto: the fastest precision per layer that meets a budget."""
    given = {"--target": target, "--budget": budget, "--keep": keep, "--pairs": pairs, "--points": points}
    given["--option"] = option
    if precision == "auto":
        if method != "ptq" or least_psnr is not None:
            raise ConfigError("a method with precision auto", expected="precision int8", fix="leave it out")
        options = parse_options(option or ())
        numbers = {"samples": samples, "pairs": pairs, "points": points, "keep": tuple(keep or ()), "seed": seed}
        _planned(api.plan(student, data, out, target or "", budget, steps, options, **numbers), out, json)
        return
    if idle := [name for name, value in given.items() if value is not None]:
        raise ConfigError(f"{idle[0]} with precision {precision}", expected="precision auto", fix="leave it out")
    made = api.quantize(student, data, out, precision, steps, samples, seed, method=method, least_psnr_db=least_psnr)
    if rows := made.lineage[-1].config.get("sweep"):
        tables.sweep(rows)
    _made(made, json)


def _planned(result: Mapping[str, Any], out: Path, as_json: bool) -> None:
    """The candidates, the verdict; exit 1 if nothing meets the budget."""
    tables.plan(result)
    report = work_folder(out) / "report.html"
    if as_json:
        _finish(result)
    elif report.is_file():
        tables.say(f"report {report}")
    if not result["chosen"]:
        raise typer.Exit(1)


@app.command()
def build(
    graph: Annotated[str, typer.Argument(help="A graph artifact, or a bundle to add a backend to.")],
    target: Annotated[
        list[str],
        typer.Option(help="openvino, onnxruntime, tensorrt, torch-tensorrt or torch; may be given several times."),
    ],
    out: Out,
    option: Annotated[
        list[str] | None,
        typer.Option(help="BACKEND.NAME=VALUE, such as tensorrt.workspace_mib=1024; may be given several times."),
    ] = None,
    json: Json = False,
) -> None:
    """Compile a graph for one or more backends into a bundle."""
    _made(api.build(graph, out, target, parse_options(option or ())), json)


@app.command()
def validate(
    bundle: Annotated[str, typer.Argument(help="The bundle to judge.")],
    against: Annotated[str, typer.Option(help="The teacher.")],
    data: Data,
    budget: Annotated[Path | None, typer.Option(help="TOML file with a table \\[drift].")] = None,
    backend: Backend = None,
    pairs: Annotated[int, typer.Option(help="Held-out pairs.")] = 32,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure drift against the teacher and the ground truth; exit 1 when over the budget."""
    evidence = api.validate(bundle, against, data, budget, backend, pairs, seed)
    tables.drift(evidence)
    if (found := len(evidence["pairs"])) < pairs:
        tables.say(f"{found} pairs instead of {pairs}: the test split has no more")
    for violation in evidence["violations"]:
        console.print(Text("over budget", "red"), violation, soft_wrap=True)
    if json:
        _finish(evidence)
    raise typer.Exit(1 if evidence["violations"] else 0)


@app.command()
def bench(
    bundle: Annotated[str, typer.Argument(help="The bundle to time.")],
    backend: Backend = None,
    runs: Annotated[int, typer.Option(help="At least so many frames.")] = 50,
    seconds: Annotated[float, typer.Option(help="For at least so long.")] = 3.0,
    save: Annotated[str | None, typer.Option(help="Keep the times as this baseline.")] = None,
    gate: Annotated[str | None, typer.Option(help="Hold the frame against this baseline.")] = None,
    against: Annotated[str | None, typer.Option(help="Or against another bundle.")] = None,
    max_slowdown: Annotated[str, typer.Option(help="What a frame may lose, such as 5% or 0.05.")] = "5%",
    limit: Annotated[float, typer.Option(help="Seconds after which a verdict is 'unstable'.")] = 120.0,
    baselines: Annotated[Path, typer.Option(help="Folder of the baselines.")] = FOLDER,
    stages: Annotated[bool, typer.Option("--stages", help="Say where the time of a frame goes.")] = False,
    sustained: Annotated[float, typer.Option(help="Minutes without a pause, to see throttling.")] = 0,
    out: Annotated[Path, typer.Option(help="Of --sustained: folder of JSON and plot.")] = Path("runs/sustained"),
    json: Json = False,
) -> None:
    """Time prepare and frame on each backend, or judge whether the frame became slower.

    Exit codes of a judgement: 0 pass, 1 regression, 2 error, 3 no baseline, 4 unstable.
    """
    judged = [f"--{name}" for name, given in (("save", save), ("gate", gate), ("against", against)) if given]
    looked = [f"--{name}" for name, given in (("stages", stages), ("sustained", sustained)) if given]
    if judged and looked:
        raise ConfigError(f"{judged[0]} and {looked[0]} at once", expected="one of them", fix="run one after the other")
    if judged:
        result = judge(
            bundle, save, gate, against, max_slowdown, backend, baselines, rounds=runs, seconds=seconds, limit_s=limit
        )
        gate_table.render(result)
        if json:
            _finish(result)
        raise typer.Exit(result["exit_code"])
    if stages or sustained:
        measured = show_bench(bundle, backend, stages, runs, sustained, out)
        if json:
            _finish(measured)
        return
    evidence = api.bench(bundle, backend, runs, seconds)
    table = tables.table("engine", "call", "p50 ms", "p95 ms", "p99 ms", "per s", "runs")
    for row in rows(evidence):
        table.add_row(*row)
    console.print(table)
    for name, reason in evidence.get("failures", {}).items():
        tables.say(f"{name} failed: {reason}")
    for name, reason in evidence.get("skipped", {}).items():
        tables.say(f"{name} skipped: {reason}")
    if json:
        _finish(evidence)
    raise typer.Exit(2 if "failures" in evidence else 0)


@app.command()
def render(
    bundle: Annotated[str, typer.Argument(help="The bundle to run.")],
    source: Annotated[Path, typer.Option(help="Picture of the person.")],
    pose: Annotated[Path, typer.Option(help="Pose as JSON: OpenPose, COCO, MediaPipe or plain keypoints.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    source_pose: Annotated[Path | None, typer.Option(help="Joints in the picture, as JSON.")] = None,
    backend: Backend = None,
    json: Json = False,
) -> None:
    """Render a person in a pose."""
    path = api.render(bundle, source, pose, out, backend, source_pose)
    _finish({"image": str(path)}) if json else tables.say(f"wrote {path}")


@app.command()
def inspect(artifact: Annotated[str, typer.Argument(help="A path or a shipped name.")], json: Json = False) -> None:
    """Show what an artifact is and how it came to be; verifies every file."""
    record = api.inspect(artifact)
    if json:
        _finish(record)
        return
    tables.say(f"{record['kind']} {record['path']}  digest {record['digest'][:12]}, every sha256 is right")
    for name, signature in record["signatures"].items():
        for side in ("inputs", "outputs"):
            for spec in signature[side]:
                tables.say(f"  {name} {side[:-1]} {spec['name']}: {spec['dtype']}{spec['shape']}")
    for stage in record["lineage"]:
        tools = ", ".join(f"{name} {version}" for name, version in stage["tools"].items())
        tables.say(f"  ← {stage['stage']}  ({tools})")
    for name, file in record["files"].items():
        tables.say(f"  {file['bytes']:>12,} bytes  {name}")
    if record["evidence"]:
        tables.say(f"  evidence: {', '.join(record['evidence'])} (--json shows it)")


@app.command()
def frontier(
    student: Annotated[str, typer.Argument(help="A student (path or student:xs).")],
    against: Annotated[str, typer.Option(help="The teacher.")],
    data: Data,
    out: Out,
    steps: Annotated[list[int] | None, typer.Option(help="May be given several times; default: 1 2 4 8.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="Likewise; default: fp32 fp16 int8.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Likewise; default: openvino onnxruntime.")] = None,
    pairs: Annotated[int, typer.Option(help="Held-out pairs.")] = 48,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 64,
    runs: Annotated[int, typer.Option(help="At least so many frames of each engine, all in turns.")] = 30,
    seconds: Annotated[float, typer.Option(help="And about so many seconds of frames, on average.")] = 2.0,
    option: Annotated[list[str] | None, typer.Option(help="BACKEND.NAME=VALUE, several times.")] = None,
    readme: Annotated[Path | None, typer.Option(help="Put the table between this file's two markers.")] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure quality against speed: steps × precision × backend."""
    chosen = {"steps": steps or None, "precisions": precision or None, "backends": target or None}
    counts = {"pairs": pairs, "samples": samples, "runs": runs, "seconds": seconds, "seed": seed}
    options = parse_options(option or ())
    result = api.frontier(student, against, data, out, readme, **chosen, **counts, options=options)
    tables.frontier(result)
    _finish(result) if json else tables.say(f"wrote {out / 'frontier.md'}")


@app.command()
def run(recipe: Annotated[Path, typer.Argument(help="A TOML recipe.")], json: Json = False) -> None:
    """Run a recipe from teacher to report; what did not change is not run again."""
    result = api.run(recipe)
    tables.say(f"report  {result['report']}\npicture {result['picture']}")
    for violation in result["violations"]:
        console.print(Text("over budget", "red"), violation, soft_wrap=True)
    if json:
        _finish(result)
    raise typer.Exit(1 if result["violations"] else 0)


app.command()(live)


def _made(artifact: Any, as_json: bool) -> None:
    record = {"path": str(artifact.path), "kind": artifact.kind, "digest": artifact.digest}
    _finish(record) if as_json else tables.say(f"wrote {artifact.kind} {artifact.path}")


def _finish(record: Mapping[str, Any]) -> None:
    """The last line of ``--json``."""
    print(json.dumps(finite(record), default=str, allow_nan=False), flush=True)


def main() -> None:
    """Entry point: user faults end in one sentence and exit code 2."""
    signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):  # what an old code page lacks, such as ←, must not end a command
        sys.stdout.reconfigure(errors="replace")
    try:
        app()
    except RpfmError as error:
        _fail(str(error))
    except SystemExit as end:
        if end.code in SIGNALS:
            _fail(f"{SIGNALS[end.code]}; finished stages are kept.", end.code)
        raise
    except shutil.Error as error:  # of a folder: what failed, from where, to where and why
        _, target, why = error.args[0][0]
        _fail(f"{target}: {why}; check the path, its permissions and the free space.")
    except OSError as error:
        fix = FIXES.get(error.errno or 0, "check the path and its permissions")
        culprit = error.filename2 or error.filename or "the disk"  # the second is where a copy goes
        _fail(f"{culprit}: {error.strerror or error}; {fix}.")


def _terminate(*_: object) -> None:
    """End as an interrupt does, so that nothing unfinished stays behind. A second signal must not stop the cleaning up:
    ``timeout`` sends it to the process and to its group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def _fail(message: str, code: int = 2) -> None:
    Console(stderr=True).print(f"rpfm-edge: {message}", soft_wrap=True, markup=False, highlight=False)
    sys.exit(code)


if __name__ == "__main__":
    main()
