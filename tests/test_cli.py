"""The command line: every user fault is one sentence with its fix and exit code 2; results are one line of JSON."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

import runtimes
from distill import rpfm
from rpfm_edge import api
from rpfm_edge.__main__ import main
from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.cli import _finish, app
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.backends import BACKENDS
from rpfm_edge.core.errors import ArtifactError, ConfigError, InputError, SignatureError
from rpfm_edge.core.files import file_digest
from rpfm_edge.judge import quality
from tests.distill.tiny import SIZE
from tests.toy import make_teacher, write_inputs

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Call = Callable[..., Ended]


@pytest.fixture(scope="module")
def made(tiny_student: Artifact, tiny_graph: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Toy artifacts and inputs; shared, so tests work on copies of what they change."""
    folder = tmp_path_factory.mktemp("made")
    source, pose = write_inputs(folder)
    paths = {"student": tiny_student.path, "graph": tiny_graph.path, "source": source, "pose": pose}
    paths["teacher"] = make_teacher(folder / "teacher")
    paths["bundle"] = api.build(tiny_graph.path, folder / "bundle", "onnxruntime").path
    return paths


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Run a command line in this process as its entry point does."""

    def run(*arguments: Any) -> Ended:
        monkeypatch.setattr(sys, "argv", ["rpfm-edge", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return Ended(int(end.value.code or 0), *capfd.readouterr())

    return run


def is_fault(ended: Ended, *words: str) -> None:
    """One sentence on standard error, which names the culprit and ends with a fix, and exit code 2."""
    assert (ended.code, ended.out) == (2, ""), ended
    assert ended.err.startswith("rpfm-edge: "), ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.endswith(".\n"), ended.err
    assert "; " in ended.err, ended.err
    for word in words:
        assert word in ended.err


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with its digest, hidden ones included."""
    return {str(path.relative_to(folder)): file_digest(path) for path in folder.rglob("*") if path.is_file()}


def render(call: Call, made: dict[str, Path], out: Path, **changes: Any) -> Ended:
    """Render with some of the arguments changed."""
    given = {"bundle": made["bundle"], "source": made["source"], "pose": made["pose"]} | changes
    bundle = given.pop("bundle")
    return call("render", bundle, *(word for name in given for word in (f"--{name}", given[name])), "--out", out)


# Pictures and poses ---------------------------------------------------------------------------------------------------


def huge_png() -> bytes:
    """The start of a PNG of 60 000 × 60 000 pixels."""
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 60_000, 60_000, 8, 2, 0, 0, 0) + bytes(4)


PICTURES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda png: b"", "no picture"),
    "text": (lambda png: b"this is no picture\n", "no picture"),
    "cut short": (lambda png: png[: len(png) // 2], "cut short"),
    "huge": (lambda png: huge_png(), "60000 × 60000"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_that_cannot_be_used(call: Call, made: dict[str, Path], tmp_path: Path, kind: str) -> None:
    change, word = PICTURES[kind]
    picture = tmp_path / "picture.png"
    picture.write_bytes(change(made["source"].read_bytes()))
    is_fault(render(call, made, tmp_path / "out.png", source=picture), str(picture), word)
    assert list(contents(tmp_path)) == ["picture.png"]


def test_a_jpeg_that_was_cut_short(call: Call, made: dict[str, Path], tmp_path: Path) -> None:
    whole = cv2.imencode(".jpg", cv2.imread(str(made["source"])))[1].tobytes()
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(whole[: len(whole) * 2 // 3])
    is_fault(render(call, made, tmp_path / "out.png", source=picture), str(picture), "cut short")


@pytest.mark.parametrize("name", ["absent.png", "."])
def test_a_picture_that_is_no_file(call: Call, made: dict[str, Path], tmp_path: Path, name: str) -> None:
    is_fault(render(call, made, tmp_path / "out.png", source=tmp_path / name), "no image file", str(tmp_path))


def points(changes: dict[int, Any]) -> str:
    """A pose of 18 points in the picture, some of them changed."""
    rows: list[Any] = [[10.0 + k, 20.0 + k] for k in range(18)]
    for index, row in changes.items():
        rows[index] = row
    return json.dumps({"keypoints": rows})


POSES = {
    "five points": (json.dumps({"keypoints": [[1, 2]] * 5}), "5 entries"),
    "19 points": (json.dumps({"keypoints": [[1, 2]] * 19}), "19 entries"),
    "17 COCO pairs": (json.dumps({"keypoints": [[1, 2]] * 17}), "COCO"),
    "outside": (points({4: [48.5, 20]}), "keypoint 4 (right_wrist)"),
    "far outside": (points({0: [20, -1e9]}), "keypoint 0 (nose)"),
    "no float": (points({4: [10**400, 20]}), "no array of numbers"),
    "no float in COCO": (json.dumps({"keypoints": [10**400, 1, 2] * 17}), "COCO"),
    "half a nan": (points({3: [float("nan"), 20]}), "keypoint 3 (right_elbow)"),
    "infinity": (points({3: [float("inf"), 20]}), "keypoint 3 (right_elbow)"),
    "only nan": (json.dumps({"keypoints": [[float("nan")] * 2] * 18}), "nobody"),
    "nobody": (json.dumps({"people": []}), "nobody"),
    "no JSON": ("keypoints: 18", "no JSON"),
    "empty": ("", "no JSON"),
    "another object": ('{"a": 1}', "no known pose format"),
}


@pytest.mark.parametrize("kind", POSES)
def test_a_pose_that_cannot_be_used(call: Call, made: dict[str, Path], tmp_path: Path, kind: str) -> None:
    text, word = POSES[kind]
    pose = tmp_path / "pose.json"
    pose.write_text(text)
    is_fault(render(call, made, tmp_path / "out.png", pose=pose), word)
    assert list(contents(tmp_path)) == ["pose.json"]


def test_a_pose_that_is_missing(call: Call, made: dict[str, Path], tmp_path: Path) -> None:
    is_fault(render(call, made, tmp_path / "out.png", pose=tmp_path / "absent.json"), "absent.json")


def test_a_picture_is_written_as_png_only(call: Call, made: dict[str, Path], tmp_path: Path) -> None:
    is_fault(render(call, made, tmp_path / "out.gif"), "out.gif")
    assert not contents(tmp_path)


# Artifacts ------------------------------------------------------------------------------------------------------------

ENGINE = "engines/onnxruntime/frame/model.onnx"


def remove(bundle: Path) -> None:
    (bundle / ENGINE).unlink()


def truncate(bundle: Path) -> None:
    os.truncate(bundle / ENGINE, (bundle / ENGINE).stat().st_size // 2)


def flip_a_bit(bundle: Path) -> None:
    data = bytearray((bundle / "noise.npy").read_bytes())
    data[-1] ^= 1
    (bundle / "noise.npy").write_bytes(data)


def wrong_sha256(bundle: Path) -> None:
    manifest = bundle / "manifest.json"
    record = json.loads(manifest.read_text())
    record["files"]["frame.onnx"] = "0" * 64
    manifest.write_text(json.dumps(record))


def truncate_manifest(bundle: Path) -> None:
    os.truncate(bundle / "manifest.json", 500)


def empty_manifest(bundle: Path) -> None:
    os.truncate(bundle / "manifest.json", 0)


def remove_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()


DAMAGES = {
    remove: "model.onnx is missing",
    truncate: "altered or cut short",
    flip_a_bit: "noise.npy was altered",
    wrong_sha256: "frame.onnx was altered",
    truncate_manifest: "manifest.json cannot be read",
    empty_manifest: "manifest.json cannot be read",
    remove_manifest: "is no artifact",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_bundle(call: Call, made: dict[str, Path], tmp_path: Path, damage: Callable[[Path], None]) -> None:
    bundle, out = shutil.copytree(made["bundle"], tmp_path / "bundle"), tmp_path / "out"
    damage(bundle)
    before = contents(tmp_path)
    is_fault(render(call, made, tmp_path / "out.png", bundle=bundle), DAMAGES[damage], "again.")
    is_fault(call("inspect", bundle), DAMAGES[damage])
    is_fault(call("bench", bundle), DAMAGES[damage])
    is_fault(call("build", bundle, "--target", "torch", "--out", out), DAMAGES[damage])
    assert contents(tmp_path) == before


def test_an_artifact_of_another_kind(call: Call, made: dict[str, Path], tmp_path: Path) -> None:
    data = ("--data", "sample", "--out", tmp_path / "out")
    is_fault(render(call, made, tmp_path / "out.png", bundle=made["graph"]), "is a graph", "a bundle")
    is_fault(call("distill", made["graph"], *data), "is a graph", "a teacher")
    is_fault(call("quantize", made["teacher"], *data), "is a teacher", "a student or graph")
    is_fault(call("build", made["student"], "--target", "torch", "--out", tmp_path / "out"), "is a student")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["absent", "student:xxl"])
def test_an_artifact_that_does_not_exist(call: Call, name: str, tmp_path: Path) -> None:
    is_fault(call("inspect", name), name)
    is_fault(call("quantize", name, "--data", "sample", "--out", tmp_path / "out"), name)
    assert not contents(tmp_path)


def test_a_person_of_another_bundle(made: dict[str, Path], tmp_path: Path) -> None:
    other = api.build(made["graph"], tmp_path / "other", "onnxruntime", {"onnxruntime": {"threads": 1}}).path
    with Pipeline.open(made["bundle"]) as ours, Pipeline.open(other) as theirs:
        person = theirs.prepare(made["source"])
        with pytest.raises(InputError, match=r"prepared by another bundle: .*; prepare the source again\."):
            ours.render(person, np.full((18, 2), 20.0))
        drawn = ours.pose_input(np.full((18, 2), 20.0))
        with pytest.raises(InputError, match="prepared by another bundle"):
            ours.render_input(person, drawn)
        with pytest.raises(InputError, match="the person is a str: expected a person of this bundle's prepare"):
            ours.render_input("x", drawn)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 8, 32, 22), (8, 8, 6), (0,)])
def test_noise_of_another_shape(made: dict[str, Path], shape: tuple[int, ...]) -> None:
    with Pipeline.open(made["bundle"]) as pipe:
        person, pose = pipe.prepare(made["source"]), np.full((18, 2), 20.0)
        with pytest.raises(SignatureError, match=r"input 'noise' is float32.*: expected float32\[1, 8, 8, 6\]; "):
            pipe.render(person, pose, np.zeros(shape, np.float32))
        with pytest.raises(SignatureError, match="input 'noise' is float64"):
            pipe.render(person, pose, pipe.noise.astype(np.float64))


# Options --------------------------------------------------------------------------------------------------------------


def test_a_recipe_with_an_unknown_key(call: Call, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"out = '{tmp_path / 'run'}'\n[[distill]]\nstepps = 4\n")
    is_fault(call("run", recipe), "recipe.toml [[distill]] 1", "'stepps'", "check the spelling")
    assert list(contents(tmp_path)) == ["recipe.toml"]
    is_fault(call("run", tmp_path / "absent.toml"), "absent.toml")


def test_an_unknown_backend(call: Call, made: dict[str, Path], tmp_path: Path) -> None:
    known = str(sorted(BACKENDS))
    is_fault(render(call, made, tmp_path / "out.png", backend="tensorflow"), "'tensorflow'", known)
    is_fault(call("bench", made["bundle"], "--backend", "tensorflow"), "'tensorflow'", known)
    is_fault(call("build", made["graph"], "--target", "tensorflow", "--out", tmp_path / "b"), "'tensorflow'", known)
    teacher = ("--against", made["teacher"], "--data", "sample")
    is_fault(call("validate", made["bundle"], *teacher, "--backend", "tensorflow"), "'tensorflow'", known)
    assert not contents(tmp_path)


def test_a_backend_that_the_bundle_was_not_built_for(call: Call, made: dict[str, Path], tmp_path: Path) -> None:
    fix = f"rpfm-edge build {made['bundle']} --target openvino"
    is_fault(render(call, made, tmp_path / "out.png", backend="openvino"), "no engine for openvino", fix)
    is_fault(call("bench", made["bundle"], "--backend", "openvino"), "no engine for openvino", fix)
    ended = render(call, made, tmp_path / "out.png", backend="torch")
    is_fault(ended, "no engine for torch", "build it from the graph, which has the student")
    spaced = shutil.copytree(made["bundle"], tmp_path / "a bundle")
    ended = render(call, made, tmp_path / "out.png", backend="openvino", bundle=spaced)
    is_fault(ended, f"rpfm-edge build '{spaced}' --target openvino --out '{spaced}'")


def test_the_fix_for_a_missing_engine_works(call: Call, made: dict[str, Path], tmp_path: Path) -> None:
    bundle = shutil.copytree(made["bundle"], tmp_path / "a bundle")
    said = render(call, made, tmp_path / "out.png", backend="openvino", bundle=bundle).err
    command = shlex.split(said.partition("run: ")[2].removesuffix(".\n"))
    assert command[0] == "rpfm-edge"
    assert call(*command[1:]).code == 0
    assert render(call, made, tmp_path / "out.png", backend="openvino", bundle=bundle).code == 0


def test_a_backend_that_is_not_installed(
    call: Call, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    install = "pip install 'rpfm-edge[onnxruntime]'"
    is_fault(render(call, made, tmp_path / "out.png"), "onnxruntime is not installed", install)
    is_fault(call("build", made["graph"], "--target", "onnxruntime", "--out", tmp_path / "b"), "not installed", install)
    assert not contents(tmp_path)


def test_a_bundle_with_an_engine_whose_library_is_not_here(
    call: Call, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, find = tmp_path / "bundle", runtimes.find_spec
    call("build", made["graph"], "--target", "openvino", "--target", "onnxruntime", "--out", bundle)
    with Pipeline.open(bundle) as pipe:
        assert pipe.backend == "openvino"
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None if name == "openvino" else find(name))
    with Pipeline.open(bundle) as pipe:
        assert pipe.backend == "onnxruntime"
    ended = call("bench", bundle, "--runs", 3, "--seconds", 0.01, "--json")
    assert [result["backend"] for result in last_json(ended)["backends"]] == ["onnxruntime"]
    assert "openvino skipped: backend openvino is not installed" in ended.out
    is_fault(call("bench", bundle, "--backend", "openvino"), "openvino is not installed")
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    is_fault(call("bench", bundle), "openvino is not installed")


def test_a_stage_whose_library_is_not_installed(
    call: Call, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    data = ("--data", "sample", "--out", tmp_path / "out")
    is_fault(call("train", "xs", *data), "torch is not installed", "rpfm-edge[distill]")
    is_fault(call("distill", made["teacher"], *data), "torch is not installed", "rpfm-edge[distill]")
    is_fault(call("quantize", made["student"], *data), "torch is not installed", "rpfm-edge[distill]")
    is_fault(call("quantize", made["graph"], *data), "nncf is not installed", "rpfm-edge[quantize]")
    assert not contents(tmp_path)


BAD_OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "preset": (("train", "xxl", "--data", "sample"), ("'xxl'", "'xs'")),
    "method": (("distill", "{teacher}", "--data", "sample", "--method", "magic"), ("'magic'", "'flowmap'")),
    "steps of a flow map": (("distill", "{teacher}", "--data", "sample", "--steps", "3"), ("3 steps", "1, 2, 4 or 8")),
    "teacher": (("distill", "nowhere:factory", "--data", "sample"), ("'nowhere:factory'", "PYTHONPATH")),
    "precision": (("quantize", "{student}", "--data", "sample", "--precision", "int4"), ("'int4'", "'int8'")),
    "no steps": (("quantize", "{student}", "--data", "sample", "--steps", "0"), ("0 steps", "at least 1")),
    "negative steps": (("quantize", "{student}", "--data", "sample", "--steps", "-1"), ("-1 steps", "at least 1")),
    "steps of a graph": (("quantize", "{graph}", "--data", "sample", "--steps", "2"), ("2 steps", "leave steps out")),
    "no data": (("quantize", "{graph}"), ("no data for precision int8", "give --data")),
    "auto": (("quantize", "{graph}", "--data", "sample", "--precision", "auto"), ("'auto'", "rpfm-edge plan")),
    "seed": (("distill", "{teacher}", "--data", "sample", "--seed", "9" * 20), ("seed = 9999", "less than 2 ** 63")),
    "samples": (("quantize", "{graph}", "--data", "sample", "--samples", "2"), ("2 calibration samples", "at least 8")),
}


@pytest.mark.parametrize("kind", BAD_OPTIONS)
def test_an_option_that_cannot_be(call: Call, made: dict[str, Path], tmp_path: Path, kind: str) -> None:
    arguments, words = BAD_OPTIONS[kind]
    is_fault(call(*(word.format_map(made) for word in arguments), "--out", tmp_path / "out"), *words)
    left = [name for name in contents(tmp_path) if not name.startswith("out.work/")]  # where distill is continued from
    assert left == []


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4-weights"])
def test_data_is_only_for_what_is_calibrated(call: Call, made: dict[str, Path], tmp_path: Path, precision: str) -> None:
    ended = call("quantize", made["graph"], "--precision", precision, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert artifact.load(tmp_path / "out", "graph").config["precision"] == precision


def test_counts_that_cannot_be(call: Call, made: dict[str, Path]) -> None:
    against = ("--against", made["teacher"], "--data", "sample")
    is_fault(call("validate", made["bundle"], *against, "--pairs", "0"), "0 pairs", "at least 1")
    is_fault(call("bench", made["bundle"], "--runs", "0"), "0 measured runs")
    for seconds in ("inf", "nan", "-1"):
        is_fault(call("bench", made["bundle"], "--seconds", seconds), f"{seconds} seconds", "finite and at least 0")
        save = ("save-baseline", made["bundle"], "--baseline", "x")
        is_fault(call(*save, "--seconds", seconds), f"{seconds} s within 120 s")


def test_a_budget_that_cannot_be(call: Call, made: dict[str, Path], tmp_path: Path) -> None:
    budget = tmp_path / "budget.toml"
    against = ("--against", made["teacher"], "--data", "sample", "--budget", budget)
    is_fault(call("validate", made["bundle"], *against), "budget.toml")
    budget.write_text("[drift]\npsnr_min = 3\n")
    is_fault(call("validate", made["bundle"], *against), "'psnr_min'", "psnr_db_min")


@pytest.mark.parametrize(("given", "seed"), [((), 7), (("--seed", 3), 3)])
def test_the_seed_of_a_training_file_counts(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[object, ...], seed: int
) -> None:
    seen: list[int] = []

    def stop(recipe: Any, *_: Any) -> None:
        seen.append(recipe.seed)
        raise ConfigError("enough was seen", expected="nothing", fix="go on")

    monkeypatch.setattr("distill.teach.train", stop)
    (tmp_path / "train.toml").write_text('preset = "xs"\nseed = 7\n')
    call("train", tmp_path / "train.toml", "--data", "sample", "--out", tmp_path / "out", *given)
    assert seen == [seed]


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_data_without_data(call: Call, made: dict[str, Path], tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    data = ("--data", tmp_path / name)
    out = ("--out", tmp_path / "out")
    is_fault(call("train", "xs", *data, *out), str(tmp_path / name))
    is_fault(call("distill", made["teacher"], *data, *out), str(tmp_path / name))
    is_fault(call("quantize", made["graph"], *data, *out), str(tmp_path / name))
    is_fault(call("validate", made["bundle"], "--against", made["teacher"], *data), str(tmp_path / name))
    assert not contents(tmp_path)


@pytest.mark.parametrize(
    "arguments", [["render"], ["build", "x", "--out", "y"], ["bench", "b", "--runs", "many"], ["x"]]
)
def test_a_command_line_that_cannot_be_parsed(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert "Traceback" not in result.stderr


def test_help_names_every_command() -> None:
    text = CliRunner().invoke(app, ["--help"]).stdout
    commands = "doctor train distill fine-tune quantize plan build validate bench profile sustain gate"
    commands += " save-baseline render inspect frontier run live"
    assert all(f" {command} " in text for command in commands.split())


# Full disks and kills -------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_bundle(
    call: Call, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(made["bundle"], tmp_path / "bundle")
    before = contents(tmp_path)

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "sendfile", full)  # what shutil copies with on Linux
    ended = call("build", made["graph"], "--target", "onnxruntime", "--out", bundle)
    is_fault(ended, "No space left on device", "free some space", str(tmp_path))
    assert contents(tmp_path) == before
    assert artifact.load(bundle, "bundle").digest == artifact.load(made["bundle"]).digest


def test_a_full_disk_while_a_folder_is_copied(
    call: Call, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``shutil`` lists every file that it could not copy; the first is enough."""

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(*arguments: Any) -> None:
        monkeypatch.setattr(os, "sendfile", full)  # what shutil copies with on Linux

    monkeypatch.setattr(runtimes.load("torch"), "require_student", fill)  # the last that it does before it copies
    ended = call("build", made["graph"], "--target", "torch", "--out", tmp_path / "bundle")
    is_fault(ended, "No space left on device", "free space", str(tmp_path), "student")
    assert len(ended.err) < 600
    assert contents(tmp_path) == {}


LIMITED = """
import resource
from rpfm_edge.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
main()
"""


def test_a_write_that_the_system_refuses_leaves_the_old_bundle(made: dict[str, Path], tmp_path: Path) -> None:
    bundle = shutil.copytree(made["bundle"], tmp_path / "bundle")
    before = contents(tmp_path)
    command = [sys.executable, "-c", LIMITED, "build", made["graph"], "--target", "onnxruntime", "--out", bundle]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    is_fault(Ended(ended.returncode, ended.stdout, ended.stderr), "File too large", "raise the limit")
    assert contents(tmp_path) == before


def test_a_kill_in_the_middle_of_a_build_leaves_the_old_bundle(made: dict[str, Path], tmp_path: Path) -> None:
    bundle = shutil.copytree(made["bundle"], tmp_path / "bundle")
    before = contents(bundle)
    command = ["build", str(made["graph"]), "--target", "openvino", "--out", str(bundle)]
    process = subprocess.Popen([sys.executable, "-m", "rpfm_edge", *command], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".bundle.*/engines")):  # the copies are made, the engines are not
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert contents(bundle) == before
    assert artifact.load(bundle, "bundle").config["backends"] == {"onnxruntime": {}}
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["bundle"]
    for half in tmp_path.glob(".bundle.*"):
        with pytest.raises(ArtifactError):
            artifact.load(half)


@pytest.mark.parametrize(
    "command",
    [
        ["train", "xs", "--data", "sample"],
        ["distill", "teacher:xs", "--data", "sample"],
        ["quantize", "student:xs", "--data", "sample"],
        ["plan", "student:xs", "--data", "sample", "--target", "onnxruntime"],
        ["build", "GRAPH", "--target", "onnxruntime"],
    ],
    ids=["train", "distill", "quantize", "plan", "build"],
)
def test_a_folder_of_the_user_is_no_place_to_write_to(
    call: Call, made: dict[str, Path], tmp_path: Path, command: list[str]
) -> None:
    """It is refused before the work, and left as it is."""
    holiday = tmp_path / "holiday"
    holiday.mkdir()
    (holiday / "photo.jpg").write_bytes(b"jpeg")
    given = [str(made["graph"]) if word == "GRAPH" else word for word in command]
    is_fault(call(*given, "--out", holiday), "holiday holds something else: expected a new folder")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["holiday", "holiday/photo.jpg"]


def test_an_interruption_says_that_finished_work_is_kept(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "inspect", interrupt)
    ended = call("inspect", "anything")
    assert (ended.code, ended.out) == (130, "")
    assert ended.err == "rpfm-edge: interrupted; finished stages are kept.\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_ended_leaves_nothing_for_long(made: dict[str, Path], tmp_path: Path, number: int) -> None:
    """Terminated, it cleans up; killed, the next one does."""
    out = tmp_path / "int8"
    code = f"""
import sys, time; sys.path = {sys.path!r}
from rpfm_edge.chain import graph
from rpfm_edge.__main__ import main
def slow(*_):
    print("quantizing", flush=True)
    time.sleep(60)
graph._quantize_graph = slow
sys.argv = ["rpfm-edge", "quantize", {str(made["graph"])!r}, "--data", "sample", "--out", {str(out)!r}]
main()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "quantizing\n"
        process.send_signal(number)
        complaint = process.communicate(timeout=30)[1]
    if number == signal.SIGTERM:
        assert (process.returncode, complaint) == (143, "rpfm-edge: terminated; finished stages are kept.\n")
    else:
        assert len(list(tmp_path.iterdir())) == 1
        api.quantize(made["graph"], "sample", out, "fp16")
    assert [path.name for path in tmp_path.iterdir()] == (["int8"] if number == signal.SIGKILL else [])


# As a program ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [({"source": "pyproject.toml"}, "no picture"), ({"bundle": "absent"}, "absent is no artifact")],
    ids=["picture", "bundle"],
)
def test_a_fault_of_the_program(made: dict[str, Path], tmp_path: Path, change: dict[str, str], words: str) -> None:
    def program(*arguments: Any) -> Ended:
        command = [sys.executable, "-m", "rpfm_edge", *map(str, arguments)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    is_fault(render(program, made, tmp_path / "out.png", **change), words)
    assert not contents(tmp_path)


# Results --------------------------------------------------------------------------------------------------------------


def last_json(ended: Ended, code: int = 0) -> dict[str, Any]:
    """The last line of standard output, which is the only one that is JSON."""
    assert ended.code == code, ended
    assert ended.err == ""
    lines = ended.out.splitlines()
    record = json.loads(lines[-1], parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert isinstance(record, dict)
    assert not [line for line in lines[:-1] if line.startswith("{")]
    return record


def test_doctor_as_json(call: Call) -> None:
    record = last_json(call("doctor", "--json"))
    assert record["backends"]["onnxruntime"] is None
    assert record["cpu"]["cores"] == os.cpu_count()


def test_train_and_distill_as_json(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rpfm.PRESETS, "tiny", rpfm.RPFMConfig(dim=32, depth=1, heads=2))
    config, teacher, student = tmp_path / "tiny.toml", tmp_path / "teacher", tmp_path / "student"
    config.write_text(f'preset = "tiny"\nsize = {list(SIZE)}\nsources = 2\ntargets_per_source = 4\n')
    seconds = [f"--{stage}seconds" for stage in ("", "autoencoder-", "alignment-", "decoder-")]
    seconds = [word for option in seconds for word in (option, 0.1)]
    record = last_json(call("train", config, "--data", "sample", "--out", teacher, *seconds, "--json"))
    assert record == {"path": str(teacher), "kind": "teacher", "digest": artifact.load(teacher).digest}
    options = ("--steps", 1, "--trajectories", 64, "--seconds", 0.1)
    record = last_json(call("distill", teacher, "--data", "sample", "--out", student, *options, "--json"))
    assert record == {"path": str(student), "kind": "student", "digest": artifact.load(student).digest}
    assert artifact.load(student).config["method"] == "flowmap"


def test_quantize_and_build_as_json(call: Call, made: dict[str, Path], tmp_path: Path) -> None:
    graph, bundle = tmp_path / "graph", tmp_path / "bundle"
    options = ("--data", "sample", "--precision", "fp32", "--steps", 1, "--out", graph, "--json")
    assert last_json(call("quantize", made["student"], *options))["kind"] == "graph"
    assert artifact.load(graph).config["steps"] == 1
    options = ("--target", "onnxruntime", "--target", "torch", "--out", bundle, "--json")
    assert last_json(call("build", graph, *options))["digest"] == artifact.load(bundle).digest
    assert set(artifact.load(bundle).config["backends"]) == {"onnxruntime", "torch"}


def test_render_and_inspect_as_json(call: Call, made: dict[str, Path], tmp_path: Path) -> None:
    out = (
        tmp_path / "[bold] a folder with a name that is longer than a terminal is wide, which is 80 columns" / "out.png"
    )
    inputs = ("--source", made["source"], "--pose", made["pose"], "--out", out)
    assert last_json(call("render", made["bundle"], *inputs, "--json")) == {"image": str(out)}
    assert cv2.imread(str(out)).shape == (*SIZE, 3)
    assert call("render", made["bundle"], *inputs).out == f"wrote {out}\n"
    assert last_json(call("inspect", made["bundle"], "--json"))["digest"] == artifact.load(made["bundle"]).digest


def test_inspect_prints_paths_as_they_are(call: Call, made: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(made["bundle"], tmp_path / "a [test] b" / ("long " * 20) / "k[" / "x]" / "bundle")
    ended = call("inspect", path)
    assert ended.code == 0, ended.err
    assert f"bundle {path}  digest {artifact.load(path).digest[:12]}, every sha256 is right\n" in ended.out
    lineage = [line for line in ended.out.splitlines() if line.startswith("  ← ")]
    assert len(lineage) == len(artifact.load(path).lineage)
    assert all(line.endswith(")") for line in lineage)


def test_an_old_code_page(made: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "rpfm_edge", "inspect", str(made["bundle"])]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"  ? build  (" in ended.stdout


def test_bench_as_json_and_as_a_table(call: Call, made: dict[str, Path], tmp_path: Path) -> None:
    bundle = shutil.copytree(made["bundle"], tmp_path / "bundle")
    ended = call("bench", bundle, "--runs", 3, "--seconds", 0.01, "--json")
    record = last_json(ended)
    assert [result["backend"] for result in record["backends"]] == ["onnxruntime"]
    assert len(record["backends"][0]["frame"]["values_s"]) == record["backends"][0]["frame"]["runs"] >= 3
    engine = "onnxruntime, fp32, 2 steps"
    assert [line[: len(engine)] for line in ended.out.splitlines()[1:3]] == [engine, engine]


def test_validate_exits_with_1_when_over_the_budget(call: Call, made: dict[str, Path], tmp_path: Path) -> None:
    bundle, budget = shutil.copytree(made["bundle"], tmp_path / "bundle"), tmp_path / "budget.toml"
    arguments = ("validate", bundle, "--against", made["teacher"], "--data", "sample", "--pairs", 2, "--json")
    assert last_json(call(*arguments))["violations"] == []
    budget.write_text("[drift]\nssim_min = 1.0\npsnr_db_min = 0.1\n")
    ended = call(*arguments, "--budget", budget)
    record = last_json(ended, code=1)
    assert len(record["violations"]) == 1
    assert f"over budget {record['violations'][0]}" in ended.out


def test_validate_says_how_many_pairs_there_were(
    call: Call, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, splits = shutil.copytree(made["bundle"], tmp_path / "bundle"), quality.open_splits("sample")
    few = replace(splits, test=replace(splits.test, pairs=splits.test.pairs[:3]))
    monkeypatch.setattr(quality, "open_splits", lambda _: few)
    arguments = ("validate", bundle, "--against", made["teacher"], "--data", "sample")
    ended = call(*arguments, "--pairs", 5)
    assert "medians of 3 pairs" in " ".join(ended.out.split())
    assert "3 pairs instead of 5: the test split has no more" in ended.out
    assert "instead of" not in call(*arguments, "--pairs", 3).out


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    _finish({"psnr_db": [float("inf"), 3.0], "deep": {"nan": float("nan")}, "words": "inf"})
    assert json.loads(capsys.readouterr().out) == {"psnr_db": [None, 3.0], "deep": {"nan": None}, "words": "inf"}


def test_run_as_json_and_over_the_budget(call: Call, made: dict[str, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"out = '{tmp_path / 'run'}'\nteacher.artifact = '{made['teacher']}'\nstudent.artifact = '{made['student']}'\n"
        "quantize = {precision = 'fp32', also = []}\nbuild.targets = ['onnxruntime']\n"
        "bench = {runs = 2, seconds = 0.01}\nvalidate = {pairs = 2, pictures = 1, budget = {ssim_min = 1.0}}\n"
    )
    ended = call("run", recipe, "--json")
    record = json.loads(ended.out.splitlines()[-1])
    assert ended.code == 1
    assert len(record["violations"]) == 1
    assert Path(record["report"]).is_file()
    assert json.loads(Path(record["report_json"]).read_text())["violations"] == record["violations"]
