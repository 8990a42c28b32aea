"""The teachers of examples/: each from its own training to a bundle, by the documented commands, at toy size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dit", "unet", "flow"])
def test_from_its_training_to_its_bundle(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    size = {"TEACHER_FOLDER": str(tmp_path / "teacher"), "TEACHER_SIZE": "64x48"}
    places = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    environment = {**os.environ, **size, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    tiny = ("--size", "64x48", "--width", "64", "--vae-widths", "8", "16", "16", "--seconds", "9")
    run(str(ROOT / "examples/train.py"), kind, "sample", str(tmp_path / "teacher"), *tiny)
    factory, cli = f"{kind}:factory", ("-m", "rpfm_edge")
    store = ("--trajectories", "64", "--steps", "2", "--seconds", "10", "--batch", "16")
    run(*cli, "distill", factory, "--data", "sample", "--out", "student", *store)
    run(*cli, "quantize", "student", "--data", "sample", "--samples", "8", "--out", "int8")
    run(*cli, "build", "int8", "--target", "onnxruntime", "--target", "openvino", "--out", "bundle")
    told = run(*cli, "validate", "bundle", "--against", factory, "--data", "sample", "--pairs", "4", "--json")
    stages = {stage["stage"]: stage for stage in json.loads(told.splitlines()[-1])["stages"]}
    for backend in ("onnxruntime", "openvino"):
        psnr = stages[f"bundle, 2 steps, int8, {backend}"]["against_teacher"]["psnr_db"]["median"]
        assert psnr > 20, f"{backend}: the student starts as its teacher, so seconds of training leave it near"
