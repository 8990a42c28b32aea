"""Recipes: what they may say, and that a run repeats only what a change touches."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import pytest

import runtimes
from distill.autoencoder import SmallAutoencoder
from distill.rpfm import PRESETS
from rpfm_edge import api
from rpfm_edge.bundle import engines
from rpfm_edge.core import artifact, files
from rpfm_edge.core.config import parse
from rpfm_edge.core.errors import ArtifactError, BackendError, ConfigError
from rpfm_edge.core.training import SMALL_MULTIPLE
from rpfm_edge.measure import machine
from rpfm_edge.recipe import run
from rpfm_edge.recipe.load import load_recipe
from rpfm_edge.recipe.schema import DistillTable, Recipe
from runtimes import ort, ov
from tests.toy import make_teacher

RECIPES = Path(__file__).parents[2] / "recipes"
TWO = "out = 'x'\n[[distill]]\nname = 'a'\n[[distill]]\nname = 'b'\n"
FLOAT = TWO + "[quantize]\nprecision = 'fp32'\n"
AUTO = TWO + "[quantize]\nprecision = 'auto'\n"
RECIPE = """
out = "run"
[teacher]
artifact = "teacher"
[store]
trajectories = 16
targets_per_source = 4
[[distill]]
steps = 1
seconds = 0.3
lr = {lr}
batch = 8
[quantize]
precision = "fp32"
also = []
[build]
targets = {targets}
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
        'out = "here"\n[[distill]]\nseconds = 5\n[build]\ntargets = ["openvino"]\nopenvino.device = "CPU"\n'
    )
    recipe = load_recipe(file)
    assert (recipe.out, recipe.data, recipe.teacher.preset, recipe.student.steps) == ("here", "sample", "xs", None)
    assert recipe.students == {"flowmap": DistillTable(seconds=5)}
    assert recipe.frontier is None
    assert recipe.build.targets == ("openvino",)
    assert recipe.build.options_of("openvino") == {"device": "CPU"}


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.toml")), ids=lambda file: file.name)
def test_the_recipes_that_come_with_the_kit_are_valid(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.out == f"runs/{file.stem}"
    for table in recipe.students.values():
        assert table.batch % recipe.store.targets_per_source == 0  # or a part of the batch would be left out


@pytest.mark.parametrize("name", ["xs-gpu", "s"])
def test_the_chain_for_a_gpu_is_the_one_that_is_tried_at_toy_size(name: str) -> None:
    toy, recipe = (load_recipe(RECIPES / f"{file}.toml") for file in ("toy", name))
    chains = [[(k, t.method, t.steps, t.init) for k, t in r.students.items()] for r in (toy, recipe)]
    assert chains[0] == chains[1]
    assert toy.student == recipe.student
    assert toy.frontier
    assert recipe.frontier
    teacher = recipe.teacher
    trained = teacher.autoencoder_seconds + teacher.alignment_seconds + teacher.seconds + teacher.decoder_seconds
    trained += (recipe.store.seconds or 0) + sum(table.seconds for table in recipe.distill)
    assert trained <= 32 * 60


@pytest.mark.parametrize(
    ("text", "problem", "expected"),
    [
        ("data = 'sample'", "lacks a key", "'out'"),
        ("out = 'x'\nouut = 'y'", "unknown key 'ouut'", "'out'"),
        ("out = 'x'\n[[distill]]\nmethods = 'flowmap'", "[[distill]] 1: unknown key 'methods'", "'method'"),
        ("out = 'x'\n[[distill]]\n[[distill]]\nsteps = '1'", "[[distill]] 2: steps = '1'", "an integer"),
        ("out = 'x'\n[distill]\nmethod = 'flowmap'", "[distill] is a single table", "[[distill]], one for each"),
        ("out = 'x'\ndistill = 'flowmap'", "distill = 'flowmap'", "a list, each a table"),
        ("out = 'x'\ndistill = ['flowmap']", "distill = ['flowmap']", "a list, each a table"),
        ("out = 'x'\n[[distill]]\n[[distill]]", "name 'flowmap' is there twice", "a name of its own"),
        ("out = 'x'\n[[distill]]\nname = '../up'", "name '../up' cannot be a folder", "letters, digits"),
        ("out = 'x'\n[[distill]]\ninit = 'flowmap'", "init = 'flowmap' is no earlier student", "one of []"),
        (f"{TWO}init = 'student:s'", "b: init = 'student:s' is no earlier student (no shipped", "one of ['a']"),
        (f"{TWO}init = 'teacher:xs'", "init = 'teacher:xs' is no earlier student", "or a student artifact"),
        (f"{TWO}[student]\nfrom = 'c'", "[student]: from = 'c' names no student", "one of ['a', 'b']"),
        (f"{TWO}[student]\nfrom = 'a'\nartifact = 'student:xs'", "from = 'a' stands beside artifact", "alone"),
        ("out = 'x'\n[student]\nfrom_ = 'a'", "[student]: unknown key 'from_'", "'from'"),
        ("out = 'x'\nfrontier = true", "frontier = True", "a table"),
        ("out = 'x'\n[frontier]\nsteps = [1, 'two']", "[frontier]: steps = [1, 'two']", "an integer"),
        ("out = 'x'\n[build]\ntflite = {}", "[build]: unknown key 'tflite'", "'openvino'"),
        ("out = 'x'\n[[distill]]\nname = 'teacher'", "name 'teacher' is reserved", "a name of its own"),
        ("out = 3", "out = 3", "a string"),
        ("out = 'x'\nseed = '0'", "seed = '0'", "an integer"),
        ("out = 'x'\nseed = true", "seed = True", "an integer"),
        ("out = 'x'\n[[distill]]\nseconds = false", "seconds = False", "a number"),
        ("out = 'x'\n[teacher]\ncompile = 1", "compile = 1", "true or false"),
        ("out = 'x'\n[[distill]]\nmethod = 'magic'", "method = 'magic'", "'reflow', 'flowmap', 'endpoint'"),
        ("out = 'x'\n[teacher]\nguidance_schedule = 'x'", "guidance_schedule = 'x'", "'interval'"),
        ("out = 'x'\n[quantize]\nprecision = 'int4'", "precision = 'int4'", "'fp32', 'fp16', 'int8'"),
        ("out = 'x'\n[quantize]\nalso = ['int8', 4]", "also = ['int8', 4]", "a list"),
        ("out = 'x'\n[quantize]\nalso = 'int8'", "also = 'int8'", "a list"),
        ("out = 'x'\n[build]\ntargets = ['tflite']", "targets = ['tflite']", "'openvino'"),
        ("out = 'x'\nteacher = 'teacher:xs'", "teacher = 'teacher:xs'", "a table"),
        (f"{TWO}[quantize]\nbudget = {{psnr_db_min = 40}}", "[quantize.budget] with precision int8", "together"),
        (f"{AUTO}budget = {{psnr_min = 40}}", "'psnr_min'", "'psnr_db_min'"),
        (f"{AUTO}[build]\ntargets = ['openvino', 'torch']", "precision auto for ['openvino', 'torch']", "together"),
        (f"{AUTO}[build]\ntargets = ['openvino', 'tensorrt']", "precision auto for", "together"),
        (f"{TWO}[qad]\nprecision = 'int4-weights'", "[qad] for int4-weights and [quantize]", "together"),
        (f"{AUTO}budget = {{pck_min = 0.9}}", "[quantize.budget] with pck_min", "distance to the float graph"),
        (f"{AUTO}budget = {{detail_min = 0.5}}", "[quantize.budget] with detail_min", "distance to the float graph"),
        (f"{AUTO}budget = {{flicker_max = 2}}", "[quantize.budget] with flicker_max", "distance to the float graph"),
        (f"{AUTO}budget = {{lpips_max = 0.1}}", "lpips_max, which cannot be measured here", "other limits"),
        (f"{TWO}[validate.budget]\npsnr_min = 30", "[validate.budget] has 'psnr_min'", "'psnr_db_min'"),
        (f"{TWO}[validate.budget]\npck_min = 'high'", "[validate.budget] sets pck_min = 'high'", "a finite number"),
        (f"{TWO}[build]\ntargets = []", "[build]: targets = []", "at least one"),
        (f"{TWO}[build]\ntargets = ['torch']", "[quantize]: precision int8 for ['torch']", "together"),
        (f"{FLOAT}also = ['fp32', 'int8']\n[build]\ntargets = ['openvino', 'torch-tensorrt']", "also int8", "together"),
        (f"{FLOAT}[build]\ntargets = ['torch']", "[quantize]: also fp16 for ['torch']", "together"),
        (
            f"{FLOAT}also = []\n[build]\ntargets = ['torch']\n[frontier]",
            "[frontier]: precisions fp16 for ['torch']",
            "together",
        ),
        (f"{TWO}[frontier]\nprecisions = ['fp8']", "[frontier]: precisions fp8 for ['openvino', 'onnx", "together"),
        (f"{TWO}[quantize]\nsamples = 7", "[quantize]: samples = 7 for int8", "at least 8"),
        (f"{AUTO}samples = 7\nalso = []", "[quantize]: samples = 7 for auto", "at least 8"),
        (f"{TWO}[frontier]\nsamples = 4", "[frontier]: samples = 4 for int8", "at least 8"),
        (f"{TWO}[frontier]\nsteps = [1, 0]", "[frontier]: steps = [1, 0]", "at least 1"),
        (f"{TWO}[frontier]\nsteps = []", "[frontier]: steps = []", "at least 1"),
        (f"{TWO}[student]\nsteps = 0", "[student]: steps = 0", "at least 1"),
        (f"{TWO}steps = 0", "[[distill]] 2: steps = 0", "at least 1"),
        (f"{TWO}steps = 3", "[[distill]] b: steps = 3", "1, 2, 4 or 8 with flowmap"),
        (f"{TWO}steps = 3\nmethod = 'endpoint'", "[[distill]] b: steps = 3", "1, 2, 4 or 8 with endpoint"),
        (
            f"{TWO}[student]\nsteps = 3",
            "[student]: steps = 3 for a student that was distilled by flowmap for 4",
            "4 or 8",
        ),
        (f"{TWO}method = 'endpoint'\n[student]\nsteps = 1", "[student]: steps = 1 for a student that was", "4"),
        (f"{TWO}[qad]\nsteps = 16", "[qad]: steps = 16 for a student that was", "4 or 8"),
        (f"{TWO}method = 'reflow'\ninit = 'a'", "[[distill]] b: init = 'a' with method reflow", "without a flow map"),
        (f"{TWO}perceptual_weight = 0.5", "b: perceptual_weight = 0.5 with method flowmap", "with endpoint"),
        (f"{TWO}[bench]\nruns = 0", "[bench]: runs = 0", "at least 1"),
        (f"{TWO}[validate]\npairs = 0", "[validate]: pairs = 0", "at least 1"),
        (f"{TWO}preset = 's'", "[[distill]] b: preset = 's'", "that of the teacher, 'xs'"),
        (f"{TWO}batch = 0", "[[distill]] 2: batch = 0", "at least 1"),
        (f"{TWO}seconds = -1", "[[distill]] 2: seconds = -1", "above 0"),
        (f"{TWO}seconds = inf", "[[distill]] 2: seconds = inf", "finite"),
        (f"{TWO}lr = nan", "[[distill]] 2: lr = nan", "above 0"),
        (f"{TWO}[store]\ntrajectories = 0", "[store]: trajectories = 0", "at least 1"),
        (f"{TWO}[store]\nseconds = 0", "[store]: seconds = 0", "above 0"),
        (f"{TWO}[qad]\nseconds = 0.0", "[qad]: seconds = 0", "above 0"),
        (f"{TWO}[teacher]\nsources = 0", "[teacher]: sources = 0", "at least 1"),
        (f"{TWO}[teacher]\nautoencoder_seconds = 0", "[teacher]: autoencoder_seconds = 0", "above 0"),
        (f"{TWO}[teacher]\nema = 0", "[teacher]: ema = 0", "above 0"),
        (f"{TWO}[teacher]\nsize = [250, 176]", "[teacher]: size = [250, 176]", "multiples of 16"),
        (f"{TWO}[teacher]\nsize = [256, 0]", "[teacher]: size = [256, 0]", "multiples of 16"),
        (f"{TWO}[teacher]\nema = 1.5", "[teacher]: ema = 1.5", "below 1"),
        (f"{TWO}[teacher]\nguidance_scale = nan", "[teacher]: guidance_scale = nan", "a finite number"),
        (f"seed = -1\n{TWO}", "seed = -1", "0 or more"),
        (f"seed = 99999999999999999999\n{TWO}", "seed = 99999999999999999999", "less than 2 ** 63"),
        (f"{TWO}[validate]\npictures = -3", "[validate]: pictures = -3", "0 or more"),
        (f"{TWO}[bench]\nseconds = nan", "[bench]: seconds = nan", "a finite number, 0 or more"),
        (f"{TWO}[bench]\nseconds = inf", "[bench]: seconds = inf", "a finite number, 0 or more"),
        (
            f"{TWO}[build]\nonnxruntime.thread = 1",
            "[build.onnxruntime]: unknown onnxruntime option 'thread'",
            "threads",
        ),
        (f"{TWO}[build]\nopenvino.hint = 'FAST'", "[build.openvino]: openvino option hint is 'FAST'", "LATENCY"),
        (f"{TWO}[build]\nopenvino = {{device = 'AUTO', threads = 2}}", "threads is 2 on AUTO", "device CPU only"),
        (
            f"{FLOAT}also = []\n[build]\ntargets = ['torch']\ntorch.threads = -1",
            "[build.torch]: torch option",
            "an integer",
        ),
        (f"{TWO}[build.tensorrt]\nworkspace_mib = 4", "[build.tensorrt]: tensorrt is no target", "'onnxruntime'"),
        (f"{TWO}[render]\nsource = 'a.png'\npose = 'a.json'", "[render]: source = 'a.png'", "a file"),
        (f"{TWO}[render]\nsource = '{__file__}'\npose = 'a.json'", "[render]: pose = 'a.json'", "a file"),
        (f"{TWO}[render]\nsource = 'a.png'", "[render]: source without pose", "both"),
        (f"{TWO}[render]\npose = 'a.json'", "[render]: pose without source", "both"),
        ("out = 'x'", "makes no student", "[student] artifact"),
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


def test_a_size_that_fits_is_offered(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(f"{TWO}[teacher]\nsize = [250, 5]\n")
    with pytest.raises(ConfigError, match=r"size = \[250, 5\]: .*; take \[256, 16\]"):
        load_recipe(file)


def test_the_multiple_of_a_size_is_that_of_the_networks() -> None:
    assert {SmallAutoencoder.factor * network.patch for network in PRESETS.values()} == {SMALL_MULTIPLE}


def test_the_single_distill_table_of_old_is_told_what_to_write(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("out = 'x'\n[distill]\nskip = true\n")
    with pytest.raises(ConfigError, match=r"write \[\[distill\]\], .* of \[store\]; to skip it, leave it out\."):
        load_recipe(file)


def test_a_student_that_is_no_student_is_refused_before_anything_runs(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("out = 'x'\n[student]\nartifact = 'teacher:xs'\n")
    with pytest.raises(ArtifactError, match="is a teacher: expected a student"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("teacher", "problem"),
    [
        ("runs/typo", "runs/typo is no artifact"),
        ("teacher:xxs", "no shipped artifact 'teacher:xxs'"),
        ("no_such_package.module:factory", "no shipped artifact 'no_such_package.module:factory'"),
        ("student:xs", "is a student"),
    ],
)
def test_a_teacher_that_is_none_is_refused_before_anything_runs(tmp_path: Path, teacher: str, problem: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(f"out = 'x'\n[student]\nartifact = 'student:xs'\n[teacher]\nartifact = '{teacher}'\n")
    with pytest.raises(ArtifactError) as raised:
        load_recipe(file)
    assert problem in raised.value.problem


def test_options_of_a_backend_that_is_not_here_are_left_to_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is trained here may be built elsewhere."""

    def absent(name: str) -> None:
        raise BackendError(f"backend {name} is not installed", expected="its package", fix="install it")

    file = tmp_path / "recipe.toml"
    file.write_text(f"{TWO}[build]\nopenvino.device = 'NPU'\nonnxruntime.provider = 'CUDAExecutionProvider'\n")
    assert load_recipe(file).build.options_of("openvino") == {"device": "NPU"}
    file.write_text(f"{TWO}[build]\ntargets = ['tensorrt']\ntensorrt.workspace_mib = 4\n")
    monkeypatch.setattr(runtimes, "load", absent)
    assert load_recipe(file).build.options_of("tensorrt") == {"workspace_mib": 4}


def test_what_the_page_needs_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "jinja2" else found(name, *rest)
    )
    with pytest.raises(BackendError, match=r"jinja2 is not installed: .* pip install 'rpfm-edge\[validate\]'"):
        api.run(tmp_path / "absent.toml")


def test_students_start_from_earlier_ones_or_from_artifacts(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(f"{TWO}init = 'a'\n[[distill]]\nname = 'c'\ninit = 'student:xs'\n[student]\nfrom = 'b'\n")
    recipe = load_recipe(file)
    assert {name: table.init for name, table in recipe.students.items()} == {"a": None, "b": "a", "c": "student:xs"}
    assert recipe.student.from_ == "b"


@pytest.mark.parametrize(
    "text",
    [
        f"{TWO}method = 'reflow'\nsteps = 3",  # which knows no step sizes
        f"{FLOAT}samples = 0",  # nothing is calibrated
        f"{TWO}preset = 'xs'",  # the teacher's
        f"{TWO}preset = 's'\n[teacher]\nartifact = 'tests.toy:factory'",  # which is no RPFM network
        f"{TWO}[bench]\nseconds = 0",  # as many runs as it says
        f"{TWO}[teacher]\nsize = [252, 180]\nautoencoder = 'vae'",  # with 2 pixels per latent, perhaps
        f"{TWO}[teacher]\nsize = [250, 170]\nartifact = 'teacher:xs'",  # where nothing is trained
        f"{FLOAT}also = []\n[build]\ntargets = ['openvino', 'torch']\n[frontier]",  # whose INT8 one of them runs
    ],
)
def test_what_looks_wrong_and_works_is_taken(tmp_path: Path, text: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    assert load_recipe(file).out == "x"


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file .*absent\.toml"):
        load_recipe(tmp_path / "absent.toml")


def test_an_integer_does_for_a_number() -> None:
    assert parse(Recipe, {"out": "x", "bench": {"seconds": 2}}, "here").bench.seconds == 2


# Runs -----------------------------------------------------------------------------------------------------------------

STAGES = ["distill-flowmap", "gain", "export", "build-fp32", "evidence", "render", "report"]
Result = dict[str, Any]
Run = Callable[..., tuple[Result, list[str]]]


def _run(
    folder: Path, lr: float = 5e-4, threads: int = 0, pairs: int = 2, targets: Sequence[str] = ("onnxruntime",)
) -> tuple[Result, list[str]]:
    """Run the toy recipe in the working directory; returns its result and the stages that were not skipped."""
    fresh: list[str] = []
    once = run.Stages.once

    def watched(self: run.Stages, name: str, *rest: Any, **options: Any) -> tuple[Path, bool]:
        out, made = once(self, name, *rest, **options)
        fresh.extend([name] if made else [])
        return out, made

    file = folder / "toy.toml"
    file.write_text(RECIPE.format(lr=lr, threads=threads, pairs=pairs, targets=[*targets]))
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


def test_the_report_has_every_stage_once(first: tuple[Path, Result, list[str]]) -> None:
    page = (first[0] / first[1]["report"]).read_text(encoding="utf-8")
    tables = [re.findall(r'<th scope="row">(.*?)</th>', table) for table in page.split("</table>")]
    assert all(len(set(stages)) == len(stages) for stages in tables)
    teacher = {stage for stages in tables for stage in stages if stage.startswith("teacher")}
    assert teacher == {f"teacher, {what}" for what in ("reference", "1 step", "2 steps", "4 steps", "8 steps")}


def _decoded(uri: str) -> bytes:
    return base64.b64decode(uri.partition(",")[2])


def test_a_second_run_makes_nothing_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a stage was run again")

    for name in ("distill", "quantize", "build", "measure_gain", "judge", "write_page", "render_picture"):
        monkeypatch.setattr(run, name, refuse)
    result, fresh = _run(folder)
    assert fresh == []
    assert Path(folder / result["report"]).is_file()


def test_more_pairs_measure_again_and_build_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing that was built depends on the pairs")

    for name in ("distill", "quantize", "build"):
        monkeypatch.setattr(run, name, refuse)
    assert _run(folder, pairs=3)[1] == ["gain", "evidence", "report"]


def test_another_option_of_the_backend_builds_again_and_distills_nothing(folder: Path) -> None:
    assert _run(folder, threads=1)[1] == ["build-fp32", "evidence", "render", "report"]
    assert artifact.load(folder / "run" / "bundle").config["backends"] == {"onnxruntime": {"threads": 1}}


def test_another_learning_rate_starts_training_afresh(folder: Path) -> None:
    before = artifact.load(folder / "run" / "students" / "flowmap")
    assert _run(folder, lr=0.05)[1] == STAGES
    after = artifact.load(folder / "run" / "students" / "flowmap")
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


def test_what_was_deleted_is_made_again_with_its_evidence(folder: Path) -> None:
    before = api.inspect(folder / "run" / "bundle")["evidence"]
    assert set(before) == {"drift", "speed"}
    shutil.rmtree(folder / "run" / "bundle")
    assert _run(folder)[1] == ["build-fp32"]
    assert api.inspect(folder / "run" / "bundle")["evidence"] == before


@pytest.mark.parametrize(
    ("lost", "again"),
    [
        ("bundle/engines/onnxruntime", ["build-fp32"]),
        ("bundle/evidence", []),  # it is kept beside the bundle, too
        ("bundle/frame.onnx", ["build-fp32"]),
        ("graphs/fp32/frame.onnx", ["export"]),
        ("pictures", ["evidence", "report"]),
        ("report.json", ["report"]),
    ],
)
def test_a_part_that_was_deleted_is_made_again(folder: Path, lost: str, again: list[str]) -> None:
    before = _files(folder / "run")
    path = folder / "run" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert [_run(folder)[1], _run(folder)[1]] == [again, []]
    assert _files(folder / "run") == before
    api.inspect(folder / "run" / "bundle")


def test_a_part_that_was_cut_short_is_made_again(folder: Path) -> None:
    model = folder / "run" / "bundle" / "frame.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:-1])
    assert [_run(folder)[1], _run(folder)[1]] == [["build-fp32"], []]
    assert model.read_bytes() == whole


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_frontier_without_its_table_or_plot_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*rest: Any, **_: Any) -> None:
        made.append("measured")
        for ending in ("json", "md", "png"):
            files.write_text(rest[3] / f"frontier.{ending}", "figures")

    made: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "measure_frontier", measured)
    file = tmp_path / "recipe.toml"
    file.write_text("out = 'run'\n[student]\nartifact = 'student:xs'\n[frontier]\n")
    for lost in ("md", "png", "json"):
        for _ in range(2):
            run._frontier(load_recipe(file), run.Stages(Path("run")), "teacher:xs", "student:xs")
        assert (made.pop(), made) == ("measured", [])
        (tmp_path / "run" / "frontier" / f"frontier.{lost}").unlink()


def test_evidence_that_is_there_is_not_replaced(folder: Path) -> None:
    api.bench(folder / "run" / "bundle", runs=4, seconds=0)
    later = api.inspect(folder / "run" / "bundle")["evidence"]
    assert _run(folder)[1] == []
    assert api.inspect(folder / "run" / "bundle")["evidence"] == later


def test_the_first_target_is_the_one_that_is_judged(folder: Path) -> None:
    both, swapped = ("onnxruntime", "torch"), ("torch", "onnxruntime")  # whose engines have the same bytes every time
    for targets in (both, swapped):
        assert "evidence" in _run(folder, targets=targets)[1]
        found = json.loads((folder / "run" / "evidence.json").read_text())
        assert found["judged"] == f"fp32, {targets[0]}"
        assert list(artifact.load(folder / "run" / "bundle").config["backends"]) == list(targets)
        kept = api.inspect(folder / "run" / "bundle")["evidence"]
        assert {one["backend"] for one in kept["speed"]["backends"]} == set(targets)
        assert kept["drift"]["stages"] == found["stages"]


def test_another_version_or_machine_builds_and_measures_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, again = machine.where, ["build-fp32", "evidence", "report"]
    monkeypatch.setattr(ort, "versions", lambda *_: {"onnxruntime": "99.0"})
    assert [_run(folder)[1], _run(folder)[1]] == [again, []]
    monkeypatch.setattr(engines, "where", lambda *given: {**where(*given), "cpu": "another one"})
    assert [_run(folder)[1], _run(folder)[1]] == [again, []]


def test_a_plan_whose_study_is_gone_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of the recipe shows it, and the digest of the graph does not cover it."""
    study, made = tmp_path / "run" / "auto" / "evidence" / "plan.json", list[str]()

    def planned(graph: Path, data: str, out: Path, *_: Any, **__: Any) -> dict[str, str]:
        with artifact.replacing_folder(out, "graph") as folder:
            files.write_text(folder / "evidence" / "plan.json", "{}")
            artifact.seal(folder, "graph", {}, {}, ())
        made.append("fp32")
        return {"chosen": "fp32"}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "plan", planned)
    file = tmp_path / "recipe.toml"
    file.write_text("out = 'run'\n[student]\nartifact = 'student:xs'\n[quantize]\nprecision = 'auto'\nalso = []\n")

    def times() -> int:
        made.clear()
        run._plan(load_recipe(file), run.Stages(Path("run")), Path("graph"), Path("run/auto"))
        return len(made)

    assert [times(), times()] == [1, 0]
    study.unlink()
    assert [times(), times()] == [1, 0]
    assert study.exists()


@pytest.mark.parametrize(
    "table", ["[frontier]\nsteps = [1]\npairs = 1\n", "[quantize]\nprecision = 'auto'\nalso = []\n"]
)
def test_figures_of_another_machine_are_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    """What the frontier and the plan of precisions measure belongs to the machine, too."""
    made: list[str] = []

    def measured(*_: Any, **__: Any) -> dict[str, str]:
        made.append("measured")
        return {"chosen": "fp32"}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "plan", measured)
    monkeypatch.setattr(run, "measure_frontier", measured)
    file = tmp_path / "recipe.toml"
    file.write_text(f"out = 'run'\n[student]\nartifact = 'student:xs'\n[build]\ntargets = ['openvino']\n{table}")
    recipe, stages = load_recipe(file), run.Stages(Path("run"))

    def times() -> int:
        made.clear()
        if recipe.frontier:
            run._frontier(recipe, stages, "teacher:xs", "student:xs")
        else:
            run._plan(recipe, stages, Path("graph"), Path("run/auto"))
        return len(made)

    assert [times(), times()] == [1, 0]
    with monkeypatch.context() as patch:
        patch.setattr(ov, "versions", lambda *_: {"openvino": "99.0"})
        assert [times(), times()] == [1, 0]
    where = machine.where
    monkeypatch.setattr(engines, "where", lambda *given: {**where(*given), "cpu": "another one"})
    assert [times(), times()] == [1, 0]


# Students -------------------------------------------------------------------------------------------------------------

CHAIN = """
out = "run"
store = {{trajectories = 16, targets_per_source = {targets}}}
[teacher]
artifact = "teacher:xs"
[[distill]]
method = "reflow"
[[distill]]
lr = {lr}
[[distill]]
name = "polished"
method = "endpoint"
steps = 1
lr = {polish}
init = "flowmap"
"""


@pytest.fixture
def distilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Goes through the students of ``CHAIN``, without training them; returns how each that was made was asked for."""

    def distill(teacher: str, data: str, out: Path, **fields: Any) -> None:
        asked.append({"name": out.name, **fields})
        Path(fields["store"]).mkdir(exist_ok=True)
        (Path(fields["store"]) / "shard").write_text(str(fields["targets_per_source"]))
        with artifact.replacing_folder(out, "student") as folder:
            artifact.seal(folder, "student", {k: fields[k] for k in ("method", "lr")}, {}, ())

    def chain(targets: int = 8, lr: float = 5e-4, polish: float = 1e-4) -> list[dict[str, Any]]:
        asked.clear()
        file = tmp_path / "chain.toml"
        file.write_text(CHAIN.format(targets=targets, lr=lr, polish=polish))
        run._students(load_recipe(file), run.Stages(Path("run")), "teacher:xs")
        return list(asked)

    asked: list[dict[str, Any]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "distill", distill)
    return chain


def test_students_share_one_store_and_one_cache(distilled: Callable[..., list[dict[str, Any]]]) -> None:
    asked = distilled()
    assert [one["name"] for one in asked] == ["reflow", "flowmap", "polished"]
    assert {(one["store"], one["cache"], one["trajectories"]) for one in asked} == {("run/store", "run/cache", 16)}
    assert [one["init"] for one in asked] == [None, None, "run/students/flowmap"]
    assert distilled() == []


def test_a_student_is_made_again_when_the_one_it_starts_from_changed(
    distilled: Callable[..., list[dict[str, Any]]],
) -> None:
    distilled()
    assert [one["name"] for one in distilled(polish=2e-4)] == ["polished"]
    assert [one["name"] for one in distilled(lr=1e-3, polish=2e-4)] == ["flowmap", "polished"]


def test_a_store_of_another_config_is_thrown_away(distilled: Callable[..., list[dict[str, Any]]]) -> None:
    distilled()
    Path("run/store/old").touch()
    assert distilled(lr=1e-3)
    assert Path("run/store/old").exists()
    assert len(distilled(targets=4)) == 3
    assert not Path("run/store/old").exists()
    assert Path("run/store/shard").read_text() == "4"


def test_fine_tuning_is_done_again_for_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    def distill(student: str, data: str, out: Path, **options: Any) -> None:
        done.append((data, options["seconds"], options["seed"]))
        out.write_text(data)

    monkeypatch.setattr(run, "fine_tune", distill)
    recipe, stages = parse(Recipe, {"out": "x", "qad": {"seconds": 5}}, "here"), run.Stages(tmp_path)
    longer = replace(recipe, qad=replace(recipe.qad, seconds=6))
    for one in (
        recipe,
        recipe,
        replace(recipe, data="b"),
        replace(longer, data="b"),
        replace(longer, data="b", seed=1),
    ):
        run._fine_tune(one, stages, "student")
    assert done == [("sample", 5, 0), ("b", 5, 0), ("b", 6, 0), ("b", 6, 1)]


# The whole chain ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_toy_recipe_tries_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run.run_recipe(RECIPES / "toy.toml")
    out = tmp_path / "runs" / "toy"
    students = {name: artifact.load(out / "students" / name) for name in ("reflow", "flowmap", "endpoint-1")}
    last = {name: student.lineage[-1] for name, student in students.items()}
    assert {stage.config["trajectories"] for stage in last.values()} == {32}
    assert last["endpoint-1"].inputs["init"] == students["flowmap"].digest
    assert "init" not in last["flowmap"].inputs

    gain = json.loads((out / "gain.json").read_text())
    assert {name: list(found) for name, found in gain["students"].items()} == {
        "reflow": ["1", "2", "4", "8"],
        "flowmap": ["1", "2", "4", "8"],
        "endpoint-1": ["1"],
    }
    assert len(gain["truth"]) == 9
    frontier = json.loads((out / "frontier" / "frontier.json").read_text())
    engines = [row for row in frontier["rows"] if row["backend"] in ("openvino", "onnxruntime")]
    assert [row.get("reason") for row in engines] == [None] * 8  # two numbers of steps, two precisions, two backends
    page = Path(result["report"]).read_text()
    shown = ("endpoint-1, 1 step, distilled in this run", "in multiples of the teacher", "validation", "Every unit")
    for words in shown:
        assert words in page
    bundle = artifact.load(out / "bundle", "bundle")
    plan = json.loads((out / "graphs" / "auto" / "evidence" / "plan.json").read_text())
    assert plan["target"] == "openvino"
    chosen = "int8" if plan["chosen"].startswith("int8") else plan["chosen"]  # the times of so small a frame decide
    assert (bundle.config["steps"], bundle.config["precision"]) == (1, chosen)
    assert artifact.load(out / "graphs" / "fp32").lineage[-1].inputs["student"] == students["flowmap"].digest

    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    run.run_recipe(RECIPES / "toy.toml")
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()} == before
