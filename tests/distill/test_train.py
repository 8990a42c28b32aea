"""The loop: it learns, resumes after a kill to the same losses, runs on two processes, and refuses what cannot be
right."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from distill import train
from distill.student import METHODS
from distill.train import TrainConfig, check_settings, fit
from rpfm_edge.core.errors import ArtifactError, ConfigError
from tests.distill.tiny import toy_teacher

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


def test_learning_rate_and_average_follow_their_schedules(tmp_path: Path) -> None:
    """Where the gradient is always 1, AdamW moves a weight by the learning rate: warm-up, then a cosine. The average
    forgets its beginning faster than its final decay does."""
    seen: list[float] = []

    def slope(model: nn.Module, step: int, rng: np.random.Generator) -> torch.Tensor:
        seen.append(model.linear.weight.item())
        return model.linear.weight.sum()

    config = TrainConfig(steps=40, lr=0.05, warmup_steps=8, final_lr_fraction=0.1, ema=0.99, precision="no")
    module = Regression(1)
    ema, _ = fit(module, slope, config, tmp_path / "c", "t")
    weights = np.array([*seen, module.linear.weight.item()])
    steps = np.arange(40)
    cosine = 0.1 + 0.9 * (1 + np.cos(np.pi * steps / 40)) / 2
    np.testing.assert_allclose(-np.diff(weights), 0.05 * np.minimum(1, (steps + 1) / 8) * cosine, rtol=1e-3)
    average = 0.0
    for step, value in enumerate(weights[1:]):
        decay = min(0.99, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value
    assert ema.linear.weight.item() == pytest.approx(average, rel=1e-4)


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Saves after every step, however long that takes."""
    monkeypatch.setattr(train, "SHARE", math.inf)
    return replace(CONFIG, save_every_s=0.0)


def test_resumes_after_a_kill_to_the_same_losses(often: TrainConfig, tmp_path: Path) -> None:
    _, whole = fit(Regression(), loss, CONFIG, tmp_path / "whole", "t")

    def dies(model: nn.Module, step: int, rng: np.random.Generator) -> torch.Tensor:
        if step == 41:
            raise Killed
        return loss(model, step, rng)

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
    with pytest.raises(ConfigError, match=r"trained with other settings \(lr\): expected lr = 0.05;"):
        fit(Regression(), loss, replace(CONFIG, lr=0.01), tmp_path / "c", "t")


def test_other_inputs_are_named(tmp_path: Path) -> None:
    config = replace(CONFIG, inputs={"batch": (8, 4), "store": {"grid": 8, "seed": 1}, "init": "a"})
    fit(Regression(), loss, config, tmp_path / "c", "t")
    check_settings(tmp_path / "c", replace(config, seconds=9.0))  # which is free
    check_settings(tmp_path / "none", config)
    other = replace(config, inputs={"batch": (8, 4), "store": {"grid": 8, "seed": 2}, "data": "b"})
    with pytest.raises(ConfigError) as raised:
        check_settings(tmp_path / "c", other)
    assert raised.value.problem.endswith("other settings (inputs.data, inputs.init, inputs.store.seed)")
    assert raised.value.expected == "inputs.data = None, inputs.init = a, inputs.store.seed = 1"


def test_a_checkpoint_that_keeps_a_digest_of_its_inputs_is_refused(tmp_path: Path) -> None:
    fit(Regression(), loss, CONFIG, tmp_path / "c", "t")
    with safe_open(tmp_path / "c", framework="pt") as file:
        metadata = dict(file.metadata())
    settings = {**json.loads(metadata["settings"]), "inputs": "3f" * 32}
    save_file(load_file(tmp_path / "c"), tmp_path / "c", {**metadata, "settings": json.dumps(settings)})
    with pytest.raises(ConfigError, match=r"was begun by an older version, .*; delete it to start afresh"):
        fit(Regression(), loss, CONFIG, tmp_path / "c", "t")


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


def weight(model: nn.Module) -> float:
    """Stands for a held-out loss: tells which weights were evaluated."""
    assert not torch.is_grad_enabled()
    return float(model.linear.weight[0, 0])


def test_the_average_is_evaluated_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    config = replace(CONFIG, evaluate_every_s=1e-9)
    ema, history = fit(Regression(), loss, config, tmp_path / "c", "t", weight)
    times, steps, values = zip(*history.validation, strict=True)
    assert steps[0] == 1
    assert (steps[-1], values[-1]) == (60, float(ema.linear.weight[0, 0]))
    assert list(times) == sorted(times)
    _, plain = fit(Regression(), loss, CONFIG, tmp_path / "plain", "t")
    assert (plain.losses, plain.validation) == (history.losses, [])


def test_evaluation_takes_three_percent_at_most_and_no_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a second, an evaluation three: 300 s of budget are 300 steps, with 100 between evaluations."""
    now = [0.0]
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def takes_a_second(model: nn.Module, step: int, rng: np.random.Generator) -> torch.Tensor:
        now[0] += 1
        return loss(model, step, rng)

    def takes_three(model: nn.Module) -> float:
        now[0] += 3
        return weight(model)

    config = TrainConfig(seconds=300, lr=0.05, precision="no", evaluate_every_s=10)
    _, history = fit(Regression(), takes_a_second, config, tmp_path / "c", "t", takes_three)
    assert (history.step, history.elapsed_s) == (300, 300)
    assert [point[:2] for point in history.validation] == [(10, 10), (110, 110), (210, 210), (300, 300)]


def test_saving_takes_three_percent_at_most_and_no_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a second, a checkpoint three: 300 s of budget are 300 steps, with 100 between checkpoints."""
    now, saved, write = [0.0], [], train._save
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def takes_a_second(model: nn.Module, step: int, rng: np.random.Generator) -> torch.Tensor:
        now[0] += 1
        return loss(model, step, rng)

    def takes_three(path: Path, *state: Any) -> None:
        now[0] += 3
        saved.append(state[3].step)
        write(path, *state)

    monkeypatch.setattr(train, "_save", takes_three)
    config = TrainConfig(seconds=300, lr=0.05, precision="no", save_every_s=9)
    _, history = fit(Regression(), takes_a_second, config, tmp_path / "c", "t")
    assert (history.step, history.elapsed_s) == (300, 300)
    assert saved == [10, 111, 212, 300]
    assert fit(Regression(), takes_a_second, config, tmp_path / "c", "t")[1].elapsed_s == 300


def test_the_curve_continues_after_a_kill(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=30, evaluate_every_s=1e-9)
    _, first = fit(Regression(), loss, config, tmp_path / "c", "t", weight)
    _, second = fit(Regression(), loss, replace(config, steps=60), tmp_path / "c", "t", weight)
    assert second.validation[: len(first.validation)] == first.validation
    assert second.validation[-1][1] == 60


def test_a_checkpoint_from_before_the_curve_resumes(tmp_path: Path) -> None:
    half = replace(CONFIG, steps=30)
    fit(Regression(), loss, half, tmp_path / "c", "t")
    with safe_open(tmp_path / "c", framework="pt") as file:
        metadata = dict(file.metadata())
    tensors, history = load_file(tmp_path / "c"), json.loads(metadata["history"])
    assert history["losses"] == []  # a header has a limit, and a run of days has millions of steps
    history["losses"] = first = tensors.pop("losses").tolist()
    del history["validation"]
    save_file(tensors, tmp_path / "c", {**metadata, "history": json.dumps(history)})
    _, resumed = fit(Regression(), loss, CONFIG, tmp_path / "c", "t")
    assert (resumed.step, len(first), resumed.losses[:30], resumed.validation) == (60, 30, first, [])


def test_a_checkpoint_names_no_device_and_no_way_of_running(tmp_path: Path) -> None:
    """What may differ between two machines is not asked for when a run continues; the rest is."""
    half = replace(CONFIG, steps=30, save_every_s=5.0, evaluate_every_s=9.0)
    fit(Regression(), loss, half, tmp_path / "c", "t")
    with safe_open(tmp_path / "c", framework="pt") as file:
        settings = json.loads(file.metadata()["settings"])
    free = {"seconds", "steps", "save_every_s", "evaluate_every_s", "compile"}
    assert set(settings) == set(TrainConfig.__slots__) - free
    _, history = fit(Regression(), loss, CONFIG, tmp_path / "c", "t")
    assert history.step == 60


def test_divergence_between_two_looks_at_the_losses(tmp_path: Path) -> None:
    """The step is named although the losses are fetched later, and no spoilt state is written."""

    def explodes(model: nn.Module, step: int, rng: np.random.Generator) -> torch.Tensor:
        return loss(model, step, rng) * (float("inf") if step == 3 else 1.0)

    with pytest.raises(ConfigError, match="the loss is inf at step 4"):
        fit(Regression(), explodes, TrainConfig(steps=7, precision="no"), tmp_path / "c", "t")
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_a_compiled_run_learns_the_same_and_continues_without(tmp_path: Path) -> None:
    half = replace(CONFIG, steps=30)
    _, plain = fit(Regression(), loss, half, tmp_path / "plain", "t")
    _, compiled = fit(Regression(), loss, replace(half, compile=True), tmp_path / "c", "t")
    np.testing.assert_allclose(compiled.losses, plain.losses, rtol=1e-4)
    _, continued = fit(Regression(), loss, CONFIG, tmp_path / "c", "t")
    assert continued.step == 60


@pytest.mark.slow
def test_a_compiler_that_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    torch.compiler.reset()
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"torch.compile failed \(.+\): expected a C\+\+ compiler"):
        fit(Regression(), loss, replace(CONFIG, compile=True), tmp_path / "c", "t")


def test_divergence_is_an_error_that_keeps_the_last_good_state(often: TrainConfig, tmp_path: Path) -> None:
    def explodes(model: nn.Module, step: int, rng: np.random.Generator) -> torch.Tensor:
        return loss(model, step, rng) * (float("nan") if step == 10 else 1.0)

    with pytest.raises(ConfigError, match="the loss is nan at step 11"):
        fit(Regression(), explodes, often, tmp_path / "c", "t")
    _, history = fit(Regression(), loss, often, tmp_path / "c", "t")
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
config = replace(CONFIG, evaluate_every_s=1e-9, save_every_s=1e-9)
ema, history = fit(Regression(), loss, config, out / "checkpoint", "t", lambda ema: float(ema.linear.weight[0, 0]))
state = PartialState()
(out / f"rank{state.process_index}.json").write_text(
    json.dumps(
        {
            "losses": history.losses,
            "weight": ema.linear.weight.tolist(),
            "validation": history.validation,
            "world": state.num_processes,
        }
    )
)
"""


TWO_STUDENTS = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from distill.store import StoreConfig, build_store, load_store
from distill.student import METHODS, DistillConfig, create_student, train_student
from distill.train import TrainConfig, join_processes
from tests.distill.tiny import toy_data, toy_teacher
out, state, teacher = Path(sys.argv[1]), join_processes(), toy_teacher()
with state.main_process_first():
    data = toy_data(teacher, out / "cache")
store = StoreConfig(trajectories=32, sources_per_shard=2, targets_per_source=4)
build_store(teacher, "toy", data, out / "store", store, processes=state)
state.wait_for_everyone()
limits = TrainConfig(steps=3, lr=1e-3, warmup_steps=1, precision="no")
made = {"world": state.num_processes}
for method in METHODS:
    config = DistillConfig(method, 2, limits, batch=8)
    student = create_student(teacher, config)
    student, history = train_student(student, data, load_store(out / "store"), config, out / method)
    weights = {name: weight.double().sum().item() for name, weight in student.network.named_parameters()}
    made[method] = {"losses": history.losses, "weights": weights}
(out / f"rank{state.process_index}.json").write_text(json.dumps(made))
"""


def two_processes(text: str, tmp_path: Path) -> list[dict[str, Any]]:
    """Run a script under torchrun; returns what each of its two processes wrote."""
    script = tmp_path / "run.py"
    script.write_text(text)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
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
    made = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [one["world"] for one in made] == [2, 2]
    return made


NODE = """
import json, sys, time
from pathlib import Path
import torch
from distill.train import TrainConfig, fit, join_processes

state, out = join_processes(), Path(sys.argv[1])
torch.manual_seed(0)
module, first = torch.nn.Linear(3, 1), []

def loss(model, step, rng):
    first.append(step)
    (out / f"step{state.process_index}").write_text(str(step))
    time.sleep(0.05)
    x = torch.from_numpy(rng.standard_normal((16, 3), dtype="float32"))
    return model(x).square().mean()

config = TrainConfig(steps=60, lr=1e-2, precision="no", save_every_s=0.2)
ema, history = fit(module, loss, config, out / "c.safetensors", "nodes")
result = {"first": first[0], "step": history.step, "weight": ema.weight.tolist(), "losses": history.losses}
(out / f"rank{state.process_index}.json").write_text(json.dumps(result))
"""


def start_node(script: Path, out: Path, port: int, host: bool) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    options = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=5", "--rdzv-backend=c10d", "--rdzv-id=test"]
    endpoint = [f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf=is_host={int(host)},timeout=10"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *endpoint, str(script), str(out)]
    log = (out / f"node{int(host)}.log").open("ab")
    return subprocess.Popen(command, env=environment, cwd=root, stdout=log, stderr=log)


def kill_node(node: subprocess.Popen[bytes]) -> None:
    """As a power cut: the launcher and its worker, which has a session of its own."""
    for process in [*psutil.Process(node.pid).children(recursive=True), node]:
        process.kill()
    node.wait()


@pytest.mark.slow
def test_a_node_that_is_killed_comes_back(tmp_path: Path) -> None:
    """Two rendezvoused nodes of one process each, on a shared folder: the run continues from its checkpoint."""
    script = tmp_path / "node.py"
    script.write_text(NODE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [start_node(script, tmp_path, port, host) for host in (True, False)]
    deadline, killed = time.monotonic() + 200, False
    try:
        while any(node.poll() != 0 for node in nodes):
            assert time.monotonic() < deadline, (tmp_path / "node1.log").read_text()[-2000:]
            if not killed and (tmp_path / "c.safetensors").exists():
                kill_node(nodes[1])
                killed = True
            for index, node in enumerate(nodes):  # as the documented loop does on each machine
                if node.poll():
                    nodes[index] = start_node(script, tmp_path, port, index == 0)
            time.sleep(0.1)
    finally:
        for node in nodes:
            if node.poll() is None:
                kill_node(node)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["first"] == second["first"] > 0, "it went on from the checkpoint"
    assert first["step"] == second["step"] == len(first["losses"]) == 60
    assert first["weight"] == second["weight"]


def test_two_processes_train_one_student(tmp_path: Path) -> None:
    """Of every method, for several steps: all that is trained is used. What is left as the teacher's is the null."""
    first, second = two_processes(TWO_STUDENTS, tmp_path)
    assert first == second
    taught = {name: weight.double().sum().item() for name, weight in toy_teacher().network.named_parameters()}
    for method in METHODS:
        assert len(first[method]["losses"]) == 3
        weights = first[method]["weights"]
        assert [name for name in taught if weights[name] == pytest.approx(taught[name], abs=1e-9)] == ["null_source"]


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """Both ranks end with the same weights, and the reported loss is the mean over both ranks' batches."""
    first, second = two_processes(TWO_PROCESSES, tmp_path)
    assert first["weight"] == second["weight"]
    assert first["validation"] == second["validation"]
    assert first["validation"][-1][1:] == [60, first["weight"][0][0]]
    batches = [np.random.default_rng([3, 0, rank]).standard_normal((16, 3), dtype=np.float32) for rank in range(2)]
    expected = np.mean([np.square(x @ TRUE.numpy().T).mean() for x in batches])
    assert first["losses"][0] == pytest.approx(expected, rel=1e-5)
    assert first["losses"][-1] < 0.1 * first["losses"][0]
