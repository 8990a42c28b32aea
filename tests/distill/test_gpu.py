"""On a real GPU: what is kept there, the store, and a run that goes from one device to the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.batches import encode_split
from distill.store import StoreConfig, build_store, load_store
from rpfm_edge.people.data import draw_batch, sample_root
from rpfm_edge.people.deepfashion import open_split
from tests.distill.tiny import SIZE, toy_teacher

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def test_batches_lie_on_the_gpu_and_are_those_of_the_cpu(tmp_path: Path) -> None:
    split, autoencoder = open_split(sample_root(), "test"), toy_teacher().autoencoder
    plain = encode_split(split, autoencoder, tmp_path, SIZE)
    kept = encode_split(split, autoencoder.cuda(), tmp_path, SIZE, "cuda")
    assert len(list(tmp_path.glob("latents-*"))) == 1
    assert kept.skeletons is not None
    drawn = draw_batch(split, 3, 4, np.random.default_rng(1))
    ours, theirs = kept.batch(*drawn, "cuda"), plain.batch(*drawn)
    assert {part.device.type for part in (ours.pose, *ours.source, ours.target)} == {"cuda"}
    assert torch.equal(ours.source.latent.cpu(), theirs.source.latent)
    torch.testing.assert_close(ours.source.pixels.cpu(), theirs.source.pixels, atol=1e-6, rtol=0)
    assert torch.equal(ours.target.cpu(), theirs.target)
    torch.testing.assert_close(ours.pose.cpu(), theirs.pose, atol=1e-6, rtol=0)


def test_paths_of_the_gpu_are_those_of_the_cpu(tmp_path: Path) -> None:
    split, teacher = open_split(sample_root(), "test"), toy_teacher()
    config, stores = StoreConfig(trajectories=64, sources_per_shard=2, targets_per_source=4), {}
    for kind in ("cpu", "cuda"):
        device = torch.device(kind)
        teacher.to(device)
        data = encode_split(split, teacher.autoencoder, tmp_path, SIZE, device)
        processes = type("One", (), {"process_index": 0, "num_processes": 1, "device": device})()
        build_store(teacher, "toy", data, tmp_path / kind, config, processes=processes)
        stores[kind] = load_store(tmp_path / kind, config, device)
    assert stores["cuda"].states.is_cuda
    torch.testing.assert_close(stores["cuda"].states.cpu(), stores["cpu"].states, atol=0.05, rtol=0.05)


TRAIN = """
import json, sys
from pathlib import Path
import numpy as np, torch
from dataclasses import replace
from distill.rpfm import RPFM
from distill.teacher import FlowMatchingConfig, train_teacher
from distill.train import TrainConfig
from distill.batches import settle_split
from tests.distill.tiny import NETWORK, toy_data, toy_teacher
out, steps, compiled = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "compiled"
from accelerate import PartialState
device = PartialState().device
teacher = toy_teacher().to(device)
data = settle_split(toy_data(toy_teacher(), out), device)
torch.manual_seed(0)
train = TrainConfig(steps=steps, lr=4e-3, warmup_steps=20, ema=0.95, compile=compiled)
config = FlowMatchingConfig(train=train, targets_per_source=4)
_, history = train_teacher(RPFM(NETWORK), teacher.autoencoder, data, config, out / "checkpoint")
print(json.dumps([device.type, history.step, float(np.mean(history.losses[-20:]))]))
"""


def test_a_run_goes_from_cpu_to_gpu_and_back(tmp_path: Path) -> None:
    """Each leg in a process of its own; the middle one is compiled. The loss keeps falling."""
    script, root = tmp_path / "run.py", str(Path(__file__).parents[2])
    script.write_text(TRAIN)
    losses = []
    for steps, on_cpu, compiled in ((60, True, "plain"), (240, False, "compiled"), (260, True, "plain")):
        environment = {**os.environ, "PYTHONPATH": root, "ACCELERATE_USE_CPU": str(on_cpu).lower()}
        command = [sys.executable, str(script), str(tmp_path), str(steps), compiled]
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        device, step, loss = json.loads(done.stdout.splitlines()[-1])
        assert (device, step) == ("cpu" if on_cpu else "cuda", steps)
        losses.append(loss)
    assert losses[1] < losses[0]
    assert losses[2] < losses[0]
