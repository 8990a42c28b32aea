"""The loop: it learns, resumes after a kill to the same losses, runs on two processes, and refuses what cannot be
right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from distill.train import TrainConfig, fit
from rpfm_edge.errors import ArtifactError, ConfigError

TRUE = torch.tensor([[2.0, -1.0, 0.5]])
CONFIG = TrainConfig(steps=60, lr=0.05, warmup_steps=5, ema=0.9, precision="no", seed=3)


class Regression(nn.Module):
    """Least squares on three weights; forward gives the loss, as the training modules of this package do."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) - y).square().mean()


def loss(model: nn.Module, step: int, rng: np.random.Generator) -> torch.Tensor:
    x = torch.from_numpy(rng.standard_normal((16, 3), dtype=np.float32))
    return model(x, x @ TRUE.T)


def test_learns_and_averages(tmp_path: Path) -> None:
    ema, history = fit(
        Regression(), loss, TrainConfig(steps=300, lr=0.05, precision="no", ema=0.9), tmp_path / "c", "t"
    )
    torch.testing.assert_close(ema.linear.weight, TRUE, atol=0.02, rtol=0)
    assert history.step == 300
    assert history.losses[-1] < 1e-2 * history.losses[0]


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


def test_resumes_after_a_kill_to_the_same_losses(tmp_path: Path) -> None:
    _, whole = fit(Regression(), loss, CONFIG, tmp_path / "whole", "t")

    def dies(model: nn.Module, step: int, rng: np.random.Generator) -> torch.Tensor:
        if step == 41:
            raise Killed
        return loss(model, step, rng)

    often = replace(CONFIG, save_every_s=0.0)
    with pytest.raises(Killed):
        fit(Regression(), dies, often, tmp_path / "cut", "t")
    seen: list[int] = []

    def counted(model: nn.Module, step: int, rng: np.random.Generator) -> torch.Tensor:
        seen.append(step)
        return loss(model, step, rng)

    _, resumed = fit(Regression(), counted, often, tmp_path / "cut", "t")
    assert seen == list(range(41, 60))
    np.testing.assert_array_equal(resumed.losses, whole.losses)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    fit(Regression(), loss, CONFIG, tmp_path / "c", "t")

    def never(model: nn.Module, step: int, rng: np.random.Generator) -> torch.Tensor:
        raise AssertionError("trained again")

    _, history = fit(Regression(), never, CONFIG, tmp_path / "c", "t")
    assert history.step == 60


def test_time_budget_ends_the_run(tmp_path: Path) -> None:
    _, history = fit(Regression(), loss, TrainConfig(seconds=0.3, lr=0.01, precision="no"), tmp_path / "c", "t")
    assert history.elapsed_s >= 0.3
    assert history.step > 3


def test_another_networks_checkpoint_is_refused(tmp_path: Path) -> None:
    fit(Regression(), loss, CONFIG, tmp_path / "c", "t")
    with pytest.raises(ArtifactError, match="does not fit this run"):
        fit(Regression(4), loss, CONFIG, tmp_path / "c", "t")


def test_other_settings_are_refused(tmp_path: Path) -> None:
    fit(Regression(), loss, CONFIG, tmp_path / "c", "t")
    with pytest.raises(ConfigError, match="trained with other settings"):
        fit(Regression(), loss, replace(CONFIG, lr=0.01), tmp_path / "c", "t")


def test_a_cut_checkpoint_is_refused_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "c"
    fit(Regression(), loss, CONFIG, file, "t")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="delete it to start afresh"):
        fit(Regression(), loss, CONFIG, file, "t")
    assert file.stat().st_size == 100


def test_no_budget() -> None:
    with pytest.raises(ConfigError, match="without a budget"):
        fit(Regression(), loss, TrainConfig(), Path("never"), "t")


def test_divergence_is_an_error_that_keeps_the_last_good_state(tmp_path: Path) -> None:
    def explodes(model: nn.Module, step: int, rng: np.random.Generator) -> torch.Tensor:
        return loss(model, step, rng) * (float("nan") if step == 10 else 1.0)

    config = TrainConfig(steps=60, precision="no", save_every_s=0.0)
    with pytest.raises(ConfigError, match="the loss is nan at step 11"):
        fit(Regression(), explodes, config, tmp_path / "c", "t")
    _, history = fit(Regression(), loss, config, tmp_path / "c", "t")
    assert np.isfinite(history.losses).all()


TWO_PROCESSES = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from accelerate import PartialState
torch.set_num_threads(1)
from tests.distill.test_train import CONFIG, Regression, loss
from distill.train import fit
out = Path(sys.argv[1])
ema, history = fit(Regression(), loss, CONFIG, out / "checkpoint", "t", cpu=True)
state = PartialState()
(out / f"rank{state.process_index}.json").write_text(
    json.dumps({"losses": history.losses, "weight": ema.linear.weight.tolist(), "world": state.num_processes})
)
"""


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """Both ranks end with the same weights, and the reported loss is the mean over both ranks' batches."""
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        str(tmp_path),
    ]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["world"] == 2
    assert first["weight"] == second["weight"]
    batches = [np.random.default_rng([3, 0, rank]).standard_normal((16, 3), dtype=np.float32) for rank in range(2)]
    expected = np.mean([np.square(x @ TRUE.numpy().T).mean() for x in batches])
    assert first["losses"][0] == pytest.approx(expected, rel=1e-5)
    assert first["losses"][-1] < 0.1 * first["losses"][0]
