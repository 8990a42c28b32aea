"""The command line: one command per function of ``rpfm_edge.api``, which it calls and whose result it prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from rpfm_edge import api
from rpfm_edge.core.config import parse_options
from rpfm_edge.core.files import finite
from rpfm_edge.core.training import Distillation, QadTable
from rpfm_edge.judge.baseline import FOLDER
from rpfm_edge.live.command import live
from rpfm_edge.measure.verdict import parse_share
from rpfm_edge.recipe.schema import StoreTable
from rpfm_edge.report import gate as verdicts
from rpfm_edge.report import tables
from rpfm_edge.search.planner import work_folder

STUDENT, PATHS = Distillation(), StoreTable().trajectories
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distill, quantize and deploy RPFM.",
)

Data = Annotated[str, typer.Option(help="Root of a data set, or 'sample'.")]
Out = Annotated[Path, typer.Option(help="Where to write the result.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every draw.")]
Backend = Annotated[str | None, typer.Option(help="One of the bundle's backends; default: all, or the first.")]
Teacher = Annotated[str, typer.Argument(help="A path, a shipped name (teacher:xs) or package.module:factory.")]
Student = Annotated[str, typer.Argument(help="A student (path or student:xs), or an FP32 graph.")]
Bundle = Annotated[str, typer.Argument(help="The bundle to measure.")]
Steps = Annotated[int | None, typer.Option(help="Steps to unroll; default: the student's.")]
Samples = Annotated[int, typer.Option(help="Calibration samples, at least 8.")]
Options = Annotated[
    list[str] | None, typer.Option(help="BACKEND.NAME=VALUE, such as openvino.threads=1; several times.")
]
Baselines = Annotated[Path, typer.Option(help="Folder of the baselines; verdicts go to results/ in it.")]
Slowdown = Annotated[str, typer.Option(help="What the median frame may lose, such as 5% or 0.05.")]
Rounds = Annotated[int, typer.Option(help="At least so many rounds.")]
RoundSeconds = Annotated[float, typer.Option(help="For at least so long.")]
Limit = Annotated[float, typer.Option(help="Seconds a backend after which it is 'unstable'.")]


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
    seconds: Annotated[float | None, typer.Option(help="Training of the flow network; default: the file's.")] = None,
    autoencoder_seconds: Annotated[float | None, typer.Option(help="Of the small autoencoder.")] = None,
    alignment_seconds: Annotated[float | None, typer.Option(help="Of the alignment.")] = None,
    decoder_seconds: Annotated[float | None, typer.Option(help="Of the aligned decoder.")] = None,
    autoencoder: Annotated[str | None, typer.Option(help="'small', or a diffusers AutoencoderKL's folder.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of every draw; default: the file's, or 0.")] = None,
    json: Json = False,
) -> None:
    """Train an RPFM teacher."""
    stages = {"autoencoder_seconds": autoencoder_seconds, "alignment_seconds": alignment_seconds}
    changes = {"seconds": seconds, "decoder_seconds": decoder_seconds, "autoencoder": autoencoder, "seed": seed}
    _made(api.train(config, data, out, **stages, **changes), json)


@app.command()
def distill(
    teacher: Teacher,
    data: Data,
    out: Out,
    method: Annotated[str, typer.Option(help="reflow, flowmap or endpoint.")] = "flowmap",
    steps: Annotated[int | None, typer.Option(help=f"That the student is meant for; default: {STUDENT.steps}.")] = None,
    seconds: Annotated[float | None, typer.Option(help=f"Training time; default: {STUDENT.seconds:g}.")] = None,
    trajectories: Annotated[int | None, typer.Option(help=f"Paths of the teacher; default: {PATHS}.")] = None,
    store_seconds: Annotated[float | None, typer.Option(help="Stop solving paths after this time.")] = None,
    preset: Annotated[str | None, typer.Option(help="Architecture, where the teacher brings no network.")] = None,
    batch: Annotated[int | None, typer.Option(help=f"Paths in a batch; default: {STUDENT.batch}.")] = None,
    codec: Annotated[str | None, typer.Option(help="Small decoder in place of the teacher's.")] = None,
    lora: Annotated[int | None, typer.Option(help="Train adapters of this rank in place of all weights.")] = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, more time.")] = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Distill a teacher to few steps, guidance folded in."""
    store = {"trajectories": trajectories, "store_seconds": store_seconds}
    memory = {"batch": batch, "codec": codec, "lora": lora, "gradient_checkpointing": gradient_checkpointing or None}
    changes = {"method": method, "steps": steps, "seconds": seconds, "preset": preset, "seed": seed, **store, **memory}
    _made(api.distill(teacher, data, out, **changes), json)


@app.command()
def distill_decoder(
    teacher: Teacher,
    data: Data,
    out: Out,
    gflop: Annotated[float, typer.Option(help="Of decoding one picture, such as 0.5, 1, 2 or 4.")] = 2.0,
    seconds: Annotated[float | None, typer.Option(help="Training time; default: 600.")] = None,
    student: Annotated[str | None, typer.Option(help="Half of the latents are this student's.")] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Train a small decoder for a teacher's latents."""
    made = api.distill_decoder(teacher, data, out, gflop=gflop, seconds=seconds, student=student, seed=seed)
    tables.decoder(made.config)
    _made(made, json)


@app.command()
def fine_tune(
    student: Annotated[str, typer.Argument(help="A student (path or student:xs).")],
    data: Data,
    out: Out,
    precision: Annotated[str, typer.Option(help="That it will be quantized to: int8 or int4-weights.")] = "int8",
    steps: Annotated[int | None, typer.Option(help="That it will run with; default: the student's.")] = None,
    seconds: Annotated[float | None, typer.Option(help=f"Training time; default: {QadTable().seconds:g}.")] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Fine-tune a student for a precision: quantization-aware distillation."""
    made = api.fine_tune(student, data, out, precision=precision, steps=steps, seconds=seconds, seed=seed)
    _made(made, json)


@app.command()
def quantize(
    student: Student,
    out: Out,
    data: Annotated[str | None, typer.Option(help="A data set, or 'sample'; only int8, fp8 and nvfp4 need it.")] = None,
    precision: Annotated[str, typer.Option(help="Or fp32, fp16, int8-, int4-weights; TensorRT: fp8, nvfp4.")] = "int8",
    steps: Steps = None,
    samples: Samples = 64,
    method: Annotated[str, typer.Option(help="Of int8: ptq, sweep or accuracy-control.")] = "ptq",
    least_psnr: Annotated[float | None, typer.Option(help="dB that accuracy-control keeps; default: 48.")] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Export a student to ONNX and quantize it."""
    made = api.quantize(student, data, out, precision, steps, samples, seed, method=method, least_psnr_db=least_psnr)
    if rows := made.lineage[-1].config.get("sweep"):
        tables.sweep(rows)
    _made(made, json)


@app.command()
def plan(
    student: Student,
    data: Data,
    out: Out,
    target: Annotated[str, typer.Option(help="The backend that has to be fast, here.")],
    budget: Annotated[Path | None, typer.Option(help="TOML with \\[drift]; default: 43 dB and SSIM 0.985.")] = None,
    steps: Steps = None,
    samples: Samples = 64,
    pairs: Annotated[int | None, typer.Option(help="Validation pairs; default: 24.")] = None,
    points: Annotated[int | None, typer.Option(help="Candidates at even distances; default: 8.")] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Units that stay float: a name or pattern, such as block0.*; several times."),
    ] = None,
    option: Options = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Export a student and quantize it: the fastest precision per layer that meets a budget; exit 1 if none does."""
    numbers = {"samples": samples, "pairs": pairs, "points": points, "keep": tuple(keep or ()), "seed": seed}
    result = api.plan(student, data, out, target, budget, steps, parse_options(option or ()), **numbers)
    tables.plan(result)
    report = work_folder(out) / "report.html"
    if json:
        _finish(result)
    elif report.is_file():
        tables.say(f"report {report}")
    if not result["chosen"]:
        raise typer.Exit(1)


@app.command()
def build(
    graph: Annotated[str, typer.Argument(help="A graph artifact, or a bundle to add a backend to.")],
    target: Annotated[list[str], typer.Option(help="A backend, such as openvino; several times, the preferred first.")],
    out: Out,
    option: Options = None,
    json: Json = False,
) -> None:
    """Compile a graph for one or more backends into a bundle."""
    _made(api.build(graph, out, target, parse_options(option or ())), json)


@app.command()
def validate(
    bundle: Annotated[str, typer.Argument(help="The bundle to judge.")],
    against: Annotated[str, typer.Option(help="The teacher: a path, a name or a factory.")],
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
    _within(evidence, json)


@app.command()
def bench(
    bundle: Bundle,
    backend: Backend = None,
    runs: Annotated[int, typer.Option(help="At least so many frames.")] = 50,
    seconds: Annotated[float, typer.Option(help="For at least so long.")] = 3.0,
    json: Json = False,
) -> None:
    """Time prepare and frame on each backend."""
    evidence = api.bench(bundle, backend, runs, seconds)
    tables.bench(evidence)
    _finish(evidence, json)
    raise typer.Exit(2 if "failures" in evidence else 0)


@app.command()
def profile(
    bundle: Bundle,
    backend: Backend = None,
    rounds: Annotated[int, typer.Option(help="Frames whose median counts.")] = 30,
    json: Json = False,
) -> None:
    """Say where the time of a frame goes."""
    evidence = api.profile(bundle, backend, rounds)
    tables.profile(evidence)
    _finish(evidence, json)


@app.command()
def sustain(
    bundle: Bundle,
    minutes: Annotated[float, typer.Option(help="So long without a pause.")],
    out: Annotated[Path, typer.Option(help="Folder of JSON and plot.")] = Path("runs/sustained"),
    backend: Backend = None,
    json: Json = False,
) -> None:
    """Render frames without a pause, to see what heat does."""
    result = api.sustain(bundle, minutes, out, backend)
    tables.sustained(result)
    missing = result.get("no_plot")
    plot = f"; no plot: {missing}" if missing else f" and {out / 'sustained.png'}"
    tables.say(f"wrote {out / 'sustained.json'}{plot}")
    _finish(result, json)


@app.command()
def gate(
    bundle: Bundle,
    baseline: Annotated[str | None, typer.Option(help="Hold the frame against this baseline.")] = None,
    against: Annotated[str | None, typer.Option(help="Or against another bundle.")] = None,
    backend: Backend = None,
    baselines: Baselines = FOLDER,
    max_slowdown: Slowdown = "5%",
    rounds: Rounds = 50,
    seconds: RoundSeconds = 3.0,
    limit: Limit = 120.0,
    json: Json = False,
) -> None:
    """Judge whether the frame became slower.

    Exit codes: 0 pass, 1 regression, 2 error, 3 no baseline, 4 unstable.
    """
    limits = _limits(max_slowdown, rounds, seconds, limit)
    _judged(api.gate(bundle, baseline, against, backend, baselines, **limits), json)


@app.command()
def save_baseline(
    bundle: Bundle,
    baseline: Annotated[str, typer.Option(help="Its name.")],
    backend: Backend = None,
    baselines: Baselines = FOLDER,
    max_slowdown: Slowdown = "5%",
    rounds: Rounds = 50,
    seconds: RoundSeconds = 3.0,
    limit: Limit = 120.0,
    json: Json = False,
) -> None:
    """Keep a frame's times on this device as a baseline of the gate; exit codes as of gate."""
    limits = _limits(max_slowdown, rounds, seconds, limit)
    _judged(api.save_baseline(bundle, baseline, backend, baselines, **limits), json)


@app.command()
def render(
    bundle: Annotated[str, typer.Argument(help="The bundle to run.")],
    source: Annotated[Path, typer.Option(help="Picture of the person.")],
    pose: Annotated[Path, typer.Option(help="Pose as JSON: OpenPose, COCO, MediaPipe or plain keypoints.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    source_pose: Annotated[Path | None, typer.Option(help="Its joints, as JSON; default: they are found.")] = None,
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
    _finish(record) if json else tables.artifact(record)


@app.command()
def frontier(
    student: Annotated[str, typer.Argument(help="A student (path or student:xs).")],
    against: Annotated[str, typer.Option(help="The teacher: a path, a name or a factory.")],
    data: Data,
    out: Out,
    steps: Annotated[list[int] | None, typer.Option(help="Steps to unroll; several times; default: 1 2 4 8.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="Likewise; default: fp32 fp16 int8.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Likewise; default: openvino onnxruntime.")] = None,
    pairs: Annotated[int, typer.Option(help="Held-out pairs.")] = 48,
    samples: Samples = 64,
    runs: Annotated[int, typer.Option(help="At least so many frames of each engine.")] = 30,
    seconds: Annotated[
        float, typer.Option(help="And about so many seconds of timed frames of each, on average.")
    ] = 2.0,
    option: Options = None,
    readme: Annotated[
        Path | None, typer.Option(help="Put the table between the two markers of this text file.")
    ] = None,
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
    _within(result, json)


app.command()(live)


def _made(artifact: Any, as_json: bool) -> None:
    record = {"path": str(artifact.path), "kind": artifact.kind, "digest": artifact.digest}
    _finish(record) if as_json else tables.say(f"wrote {artifact.kind} {artifact.path}")


def _within(result: Mapping[str, Any], as_json: bool) -> None:
    """What is over the budget; exit 1 if anything is."""
    for violation in result["violations"]:
        tables.console.print(Text("over budget", "red"), violation, soft_wrap=True)
    _finish(result, as_json)
    raise typer.Exit(1 if result["violations"] else 0)


def _limits(max_slowdown: str, rounds: int, seconds: float, limit: float) -> dict[str, float]:
    """The fields of ``GateConfig``."""
    return {"max_slowdown": parse_share(max_slowdown), "rounds": rounds, "seconds": seconds, "limit_s": limit}


def _judged(result: Mapping[str, Any], as_json: bool) -> None:
    """The verdicts, and the exit code that they come to."""
    verdicts.render(result)
    _finish(result, as_json)
    raise typer.Exit(result["exit_code"])


def _finish(record: Mapping[str, Any], as_json: bool = True) -> None:
    """The last line of ``--json``."""
    if as_json:
        print(json.dumps(finite(record), default=str, allow_nan=False), flush=True)
