"""A device: the wheel with one backend in a fresh environment, without torch, renders. Needs a package index."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from rpfm_edge import api
from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.people.formats import read_pose
from tests.toy import write_inputs

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent

RENDER = """
import json, sys
from importlib.util import find_spec
import numpy as np
import rpfm_edge
from rpfm_edge.people.formats import read_pose
bundle, source, pose, out = sys.argv[1:]
with rpfm_edge.Pipeline.open(bundle) as pipe:
    image = pipe.render(pipe.prepare(source), read_pose(pose, pipe.size))
    np.save(out, image)
loaded = sorted({name.partition(".")[0] for name in sys.modules})
absent = [name for name in ("torch", "onnx", "onnxruntime", "nncf") if find_spec(name) is None]
print(json.dumps({"backend": pipe.backend, "from": rpfm_edge.__file__, "absent": absent, "loaded": loaded}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a program outside the checkout, seeing no module of it; returns its standard output."""
    hidden = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    ended = subprocess.run([*map(str, command)], cwd=cwd, env=hidden, capture_output=True, text=True)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment that has the wheel and OpenVINO."""
    folder = tmp_path_factory.mktemp("device")
    venv.create(folder, with_pip=True)
    constraints = ("--constraint", ROOT / "constraints.txt")
    install = ("-m", "pip", "install", "--quiet", *constraints, f"{wheel}[openvino]")
    run(folder / "bin" / "python", *install, cwd=folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def bundle(tiny_graph: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return api.build(tiny_graph.path, tmp_path_factory.mktemp("bundle") / "bundle", "openvino").path


def test_the_wheel_holds_the_product_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    (info,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {"rpfm_edge", "distill", "quantize", "runtimes", info}
    for file in ("assets/people/fasion-resize-pairs-test.csv", "report/templates/report.html.j2", "core/shipped.py"):
        assert f"rpfm_edge/{file}" in names
    tracked = run("git", "ls-files", "rpfm_edge/assets", cwd=ROOT).split()
    assert {name for name in names if name.startswith("rpfm_edge/assets/")} >= set(tracked)
    assert not [name for name in names if "__pycache__" in name or ".work/" in name]


def test_a_device_renders_with_the_library(device: Path, bundle: Path, tmp_path: Path) -> None:
    source, pose = write_inputs(tmp_path)
    image = tmp_path / "image.npy"
    found = json.loads(run(device / "python", "-c", RENDER, bundle, source, pose, image, cwd=tmp_path))
    assert found["backend"] == "openvino"
    assert found["absent"] == ["torch", "onnx", "onnxruntime", "nncf"]
    assert Path(found["from"]).is_relative_to(device.parent)
    assert not {"distill", "quantize", "matplotlib", "skimage", "scipy"} & set(found["loaded"])
    with Pipeline.open(bundle) as pipe:
        here = pipe.render(pipe.prepare(source), read_pose(pose, pipe.size))
    assert np.abs(np.load(image).astype(int) - here).max() <= 1


def test_a_device_renders_with_the_program(device: Path, bundle: Path, tmp_path: Path) -> None:
    source, pose = write_inputs(tmp_path)
    picture = tmp_path / "picture.png"
    inputs = ("--source", source, "--pose", pose, "--out", picture, "--json")
    assert json.loads(run(device / "rpfm-edge", "render", bundle, *inputs, cwd=tmp_path)) == {"image": str(picture)}
    with Pipeline.open(bundle) as pipe:
        here = pipe.render(pipe.prepare(source), read_pose(pose, pipe.size))
    assert np.abs(cv2.imread(str(picture))[..., ::-1].astype(int) - here).max() <= 1


def test_a_device_knows_what_it_lacks(device: Path, bundle: Path, tmp_path: Path) -> None:
    diagnosis = json.loads(run(device / "rpfm-edge", "doctor", "--json", cwd=tmp_path))
    assert [name for name, reason in diagnosis["backends"].items() if reason is None] == ["openvino"]
    assert diagnosis["intruders"] == {}
    command = ("bench", bundle, "--runs", "3", "--seconds", "0.1", "--json")
    times = json.loads(run(device / "rpfm-edge", *command, cwd=tmp_path).splitlines()[-1])
    assert times["backends"][0]["backend"] == "openvino"
    train = [device / "rpfm-edge", "train", "xs", "--data", "sample", "--out", tmp_path / "teacher"]
    ended = subprocess.run(train, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == (
        "rpfm-edge: torch is not installed: expected the extra distill; run: pip install 'rpfm-edge[distill]'.\n"
    )
