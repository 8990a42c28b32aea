"""Recipes: what they may say, and that a run repeats only what a change touches."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest

from rpfm_edge import api, artifact, run
from rpfm_edge.errors import ConfigError
from rpfm_edge.recipe import Recipe, load_recipe, parse
from runtimes import ort
from tests.toy import make_teacher

RECIPE = """
out = "run"
[teacher]
artifact = "teacher"
[distill]
steps = 1
trajectories = 16
seconds = 0.3
lr = {lr}
batch = 8
targets_per_source = 4
[quantize]
precision = "fp32"
also = []
[build]
targets = ["onnxruntime"]
onnxruntime.threads = {threads}
[validate]
pairs = {pairs}
pictures = 2
[bench]
runs = 3
seconds = 0.01
"""


def test_defaults_fill_what_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(
        'out = "here"\n[distill]\nseconds = 5\n[build]\ntargets = ["onnxruntime"]\nopenvino.device = "CPU"\n'
    )
    recipe = load_recipe(file)
    assert (recipe.out, recipe.data, recipe.teacher.preset, recipe.student.steps) == ("here", "sample", "xs", None)
    assert recipe.distill.seconds == 5
    assert recipe.build.targets == ("onnxruntime",)
    assert recipe.build.openvino == {"device": "CPU"}


@pytest.mark.parametrize("name", ["demo.toml", "xs.toml"])
def test_the_recipes_that_come_with_the_kit_are_valid(name: str) -> None:
    assert load_recipe(Path(__file__).parent.parent / "recipes" / name).out.startswith("runs/")


@pytest.mark.parametrize(
    ("text", "problem", "expected"),
    [
        ("data = 'sample'", "lacks a key", "'out'"),
        ("out = 'x'\nouut = 'y'", "unknown key 'ouut'", "'out'"),
        ("out = 'x'\n[distill]\nmethods = 'flowmap'", "[distill]: unknown key 'methods'", "'method'"),
        ("out = 'x'\n[build]\ntensorrt = {}", "[build]: unknown key 'tensorrt'", "'openvino'"),
        ("out = 3", "out = 3", "a string"),
        ("out = 'x'\nseed = '0'", "seed = '0'", "an integer"),
        ("out = 'x'\nseed = true", "seed = True", "an integer"),
        ("out = 'x'\n[distill]\nseconds = false", "seconds = False", "a number"),
        ("out = 'x'\n[distill]\nskip = 1", "skip = 1", "true or false"),
        ("out = 'x'\n[distill]\nmethod = 'magic'", "method = 'magic'", "'reflow', 'flowmap', 'endpoint'"),
        ("out = 'x'\n[teacher]\nguidance_schedule = 'x'", "guidance_schedule = 'x'", "'interval'"),
        ("out = 'x'\n[quantize]\nprecision = 'int4'", "precision = 'int4'", "'fp32', 'fp16', 'int8'"),
        ("out = 'x'\n[quantize]\nalso = ['int8', 4]", "also = ['int8', 4]", "a list"),
        ("out = 'x'\n[quantize]\nalso = 'int8'", "also = 'int8'", "a list"),
        ("out = 'x'\n[build]\ntargets = ['tensorrt']", "targets = ['tensorrt']", "'openvino'"),
        ("out = 'x'\nteacher = 'teacher:xs'", "teacher = 'teacher:xs'", "a table"),
        ("out = 'x'\n[distill]\nskip = true", "makes no student", "[student] artifact"),
        ("out = ", "cannot be read", "valid TOML"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(tmp_path: Path, text: str, problem: str, expected: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_recipe(file)
    assert problem in raised.value.problem
    assert expected in raised.value.expected
    assert "recipe.toml" in str(raised.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file .*absent\.toml"):
        load_recipe(tmp_path / "absent.toml")


def test_an_integer_does_for_a_number() -> None:
    assert parse(Recipe, {"out": "x", "bench": {"seconds": 2}}, "here").bench.seconds == 2


# Runs -----------------------------------------------------------------------------------------------------------------

STAGES = ["distill", "export", "build-fp32", "gain", "evidence", "render", "report"]
Result = dict[str, Any]
Run = Callable[..., tuple[Result, list[str]]]


def _run(folder: Path, lr: float = 5e-4, threads: int = 0, pairs: int = 2) -> tuple[Result, list[str]]:
    """Run the toy recipe in the working directory; returns its result and the stages that were not skipped."""
    fresh: list[str] = []
    once = run.Stages.once

    def watched(self: run.Stages, name: str, *rest: Any) -> tuple[Path, bool]:
        out, made = once(self, name, *rest)
        fresh.extend([name] if made else [])
        return out, made

    file = folder / "toy.toml"
    file.write_text(RECIPE.format(lr=lr, threads=threads, pairs=pairs))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(run.Stages, "once", watched)
        return run.run_recipe(Path("toy.toml")), fresh


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result, list[str]]:
    """A folder in which the toy recipe ran once; the module's tests work on copies."""
    folder = tmp_path_factory.mktemp("first")
    make_teacher(folder / "teacher")
    return folder, *_run(folder)


@pytest.fixture
def folder(first: tuple[Path, Result, list[str]], tmp_path: Path) -> Path:
    return shutil.copytree(first[0], tmp_path / "copy")


def test_a_recipe_goes_from_teacher_to_report(first: tuple[Path, Result, list[str]]) -> None:
    folder, result, fresh = first
    assert fresh == STAGES
    bundle = artifact.load(folder / result["bundle"], "bundle")
    assert [stage.stage for stage in bundle.lineage] == ["distill", "export", "build"]
    assert bundle.lineage[0].inputs == {"teacher": artifact.load(folder / "teacher").digest}
    assert cv2.imread(str(folder / result["picture"])).shape == (64, 48, 3)
    assert result["violations"] == []


def test_the_report_needs_no_network_and_shows_the_pictures(first: tuple[Path, Result, list[str]]) -> None:
    page = (first[0] / first[1]["report"]).read_text(encoding="utf-8")
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page) + re.findall(r"url\(([^)]*)\)", page)
    assert sources
    assert not [source for source in sources if not source.startswith(("data:", "#"))]
    shown = [source for source in sources if source.startswith("data:image/png;base64,")]
    for file in sorted((first[0] / "run" / "pictures").glob("*.png")):
        assert file.read_bytes() in [_decoded(source) for source in shown]


def _decoded(uri: str) -> bytes:
    return base64.b64decode(uri.partition(",")[2])


def test_a_second_run_makes_nothing_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a stage was run again")

    for module, names in ((api, ("distill", "quantize", "build")), (run, ("compare_steps", "judge", "write_page"))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(run, "render_picture", refuse)
    result, fresh = _run(folder)
    assert fresh == []
    assert Path(folder / result["report"]).is_file()


def test_more_pairs_measure_again_and_build_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing that was built depends on the pairs")

    for name in ("distill", "quantize", "build"):
        monkeypatch.setattr(api, name, refuse)
    assert _run(folder, pairs=3)[1] == ["gain", "evidence", "report"]


def test_another_option_of_the_backend_builds_again_and_distills_nothing(folder: Path) -> None:
    assert _run(folder, threads=1)[1] == ["build-fp32", "evidence", "render", "report"]
    assert artifact.load(folder / "run" / "bundle").config["backends"] == {"onnxruntime": {"threads": 1}}


def test_another_learning_rate_starts_training_afresh(folder: Path) -> None:
    before = artifact.load(folder / "run" / "student")
    assert _run(folder, lr=0.05)[1] == STAGES
    after = artifact.load(folder / "run" / "student")
    assert after.lineage[-1].config["train"]["lr"] == 0.05
    assert after.files["network.safetensors"] != before.files["network.safetensors"]  # not the old one, taken as done


def test_a_stage_that_was_stopped_half_way_is_run_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = artifact.load(folder / "run" / "bundle").digest

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ort, "build", stopped)
        with pytest.raises(KeyboardInterrupt):
            _run(folder, threads=1)
    assert artifact.load(folder / "run" / "bundle").digest == old
    assert _run(folder, threads=1)[1] == ["build-fp32", "evidence", "render", "report"]


def test_what_was_deleted_is_made_again(folder: Path) -> None:
    shutil.rmtree(folder / "run" / "bundle")
    assert _run(folder)[1][0] == "build-fp32"
