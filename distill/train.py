"""One training loop for autoencoder, teacher and students: time or step budget, EMA, bf16, resume, several processes.

A batch is a pure function of (seed, step, rank), so a resumed run sees what the uninterrupted one would have seen. A
checkpoint knows no device: what was begun on a CPU continues on a GPU, and the other way round.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from distill.weights import readable, untied
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.files import write_bytes
from rpfm_edge.core.progress import progress

LossFunction = Callable[[nn.Module, int, np.random.Generator], Tensor]
Evaluate = Callable[[nn.Module], float]
FETCH_EVERY = 20  # steps between two waits for the device
SHARE = 0.03  # of the time that evaluating takes, and that saving takes, at most


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """The loop's settings. Give ``seconds``, ``steps`` or both: the budget that ends first ends the run."""

    seconds: float | None = None
    steps: int | None = None
    lr: float = 1e-3
    warmup_steps: int = 100
    final_lr_fraction: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema: float = 0.999
    precision: str = "bf16"  # autocast: "no" or "bf16"
    seed: int = 0
    inputs: Mapping[str, Any] = field(default_factory=dict)  # what else a resumed run must share: data, batches, …
    save_every_s: float = 60.0
    evaluate_every_s: float = 0.0  # of training; 0: never
    compile: bool = False  # by torch.compile: a minute at the start, fewer and larger kernels after it


FREE = ("seconds", "steps", "save_every_s", "evaluate_every_s", "compile")  # what a resumed run may change


@dataclass(slots=True)
class History:
    """Where a run stands: steps done, seconds spent training, the loss of each step, and the held-out loss now and
    then, as (seconds, step, loss)."""

    step: int = 0
    elapsed_s: float = 0.0
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[float, int, float]] = field(default_factory=list)


def join_processes() -> PartialState:
    """This process, or those of torchrun, each with a device of its own.

    Accelerate joins those without a GPU only if it is told that they run on the CPU.
    """
    return PartialState(cpu="LOCAL_RANK" in os.environ and not torch.cuda.is_available())


def fit(
    module: nn.Module,
    loss: LossFunction,
    config: TrainConfig,
    checkpoint: Path,
    title: str,
    evaluate: Evaluate | None = None,
) -> tuple[nn.Module, History]:
    """Minimise ``loss(module, step, rng)`` and return the EMA of the module with the run's history.

    Resumes from ``checkpoint`` (one safetensors file) if it exists, and saves there every ``save_every_s`` seconds
    and at the end. Learning rate: linear warm-up, then cosine over the budget.

    ``evaluate(ema)`` is called every ``evaluate_every_s`` seconds and at the end. Neither evaluating nor saving is done
    so often that it takes more than 3 % of the time, and neither counts: the budget is training alone, so that a run
    learns the same whether it is watched or not, on a fast disk or a slow one.
    """
    if not config.seconds and not config.steps:
        raise ConfigError("a training run without a budget", expected="seconds or steps", fix="give one of them")
    run = _begin(module, config, checkpoint, title)
    history, watched = run.history, evaluate if config.evaluate_every_s else None
    begun, saved = time.monotonic() - history.elapsed_s, history.elapsed_s
    with progress(title, total=1000) as advance:
        while (done := _progress(history, config)) < 1:
            run.train_step(loss, done)
            history.elapsed_s = _agree(run.accelerator, time.monotonic() - begun)
            if history.step % FETCH_EVERY == 0:
                run.fetch()
            advance(1000 * _progress(history, config), run.note())
            if history.elapsed_s - saved > max(config.save_every_s, run.save_s / SHARE):
                begun += run.save()
                saved = history.elapsed_s
            if watched and run.evaluation_is_due():
                begun += run.evaluate(watched)
    if watched and [step for _, step, _ in history.validation[-1:]] != [history.step]:
        run.evaluate(watched)
    run.save()
    run.accelerator.wait_for_everyone()
    return run.ema, history


@dataclass(slots=True)
class _Run:
    """What is trained, and what trains it. ``model`` is ``module`` behind DDP and torch.compile, as the case may be."""

    accelerator: Accelerator
    module: nn.Module
    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    history: History
    config: TrainConfig
    checkpoint: Path
    title: str
    pending: list[Tensor] = field(default_factory=list)  # losses that are still on the device
    evaluation_s: float = 0.0  # how long the last evaluation took
    save_s: float = 0.0  # and the last checkpoint

    def train_step(self, loss: LossFunction, done: float) -> None:
        """One step of the optimizer, without waiting for the device."""
        config, history, accelerator = self.config, self.history, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * _lr_factor(history.step, done, config)
        rng = np.random.default_rng([config.seed, history.step, accelerator.process_index])
        with _compile_errors(config.compile):
            with self.autocast():
                value = loss(self.model, history.step, rng)
            accelerator.backward(value)
        accelerator.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        _update_ema(self.ema, self.module, min(config.ema, (1 + history.step) / (10 + history.step)))
        self.pending.append(value.detach())
        history.step += 1

    def autocast(self) -> torch.autocast:
        """Of this device, in the config's precision."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def fetch(self) -> None:
        """Wait for the device and note its losses, the mean over all processes; one that is not finite is an error."""
        if not self.pending:
            return
        losses = self.accelerator.reduce(torch.stack(self.pending), "mean").tolist()
        first = self.history.step - len(losses) + 1
        self.pending.clear()
        self.history.losses += losses
        for step, value in enumerate(losses, first):
            if not math.isfinite(value):
                raise ConfigError(
                    f"{self.title}: the loss is {value} at step {step}",
                    expected="a finite loss",
                    fix=f"lower the learning rate; the last good state is kept in {self.checkpoint}",
                )

    def note(self) -> str:
        """For the progress bar."""
        known = self.history.losses[-50:]
        return f"loss {np.mean(known):.4f}" if known else ""

    def save(self) -> float:
        """Write the checkpoint, unless the last losses say that the state is spoilt; returns the seconds it took."""
        self.fetch()
        started = time.monotonic()
        if self.accelerator.is_main_process:
            _save(self.checkpoint, self.module, self.ema, self.optimizer, self.history, _settings(self.config))
        self.save_s = _agree(self.accelerator, time.monotonic() - started)
        return time.monotonic() - started  # also of those that have waited for the one that writes

    def evaluation_is_due(self) -> bool:
        """The same in all processes, which evaluate at the same step."""
        last = self.history.validation[-1][0] if self.history.validation else 0.0
        pause_s = max(self.config.evaluate_every_s, self.evaluation_s / SHARE)
        return self.history.elapsed_s - last >= pause_s

    def evaluate(self, evaluate: Evaluate) -> float:
        """Note the loss of the EMA on held-out data; returns the seconds that it took."""
        self.fetch()  # what the device still trains is no part of the evaluation
        started = time.monotonic()
        with torch.no_grad(), self.autocast():
            value = evaluate(self.ema)
        took_s = time.monotonic() - started
        self.evaluation_s = _agree(self.accelerator, took_s)
        self.history.validation.append((self.history.elapsed_s, self.history.step, value))
        return took_s


def _begin(module: nn.Module, config: TrainConfig, checkpoint: Path, title: str) -> _Run:
    join_processes()  # which the accelerator joins
    accelerator = Accelerator()
    module = module.to(accelerator.device).train()
    ema = deepcopy(module).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    history = History()
    if checkpoint.exists():
        history = _restore(checkpoint, module, ema, optimizer)
        check_settings(checkpoint, config)
    model, optimizer = accelerator.prepare(module, optimizer)
    if config.compile:
        model = torch.compile(model)
    return _Run(accelerator, module, model, ema, optimizer, history, config, checkpoint, title)


@contextmanager
def _compile_errors(compiling: bool) -> Iterator[None]:
    """Say in one sentence why torch.compile, which works at the first step, does not."""
    if not compiling:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"torch.compile failed ({reason})",
            expected="a C++ compiler, and Triton on a GPU",
            fix="install them, or train without compile; the run continues from its checkpoint",
        ) from None


def _settings(config: TrainConfig) -> dict[str, Any]:
    """What a resumed run must share with the one that it continues, as JSON holds it."""
    settings: dict[str, Any] = json.loads(json.dumps({k: v for k, v in asdict(config).items() if k not in FREE}))
    return settings


def check_settings(checkpoint: Path, config: TrainConfig) -> None:
    """Raise ``ConfigError`` if a run with ``config`` may not continue from ``checkpoint``, where there is one."""
    if not checkpoint.exists():
        return
    with _readable(checkpoint), safe_open(checkpoint, framework="pt") as file:
        saved = json.loads(file.metadata()["settings"])
    if isinstance(saved.get("inputs"), str):  # a digest, which older versions kept
        raise ConfigError(
            f"{checkpoint} was begun by an older version, and does not say what it learns from",
            expected="a checkpoint of this version",
            fix="delete it to start afresh",
        )
    if other := _differences(saved, _settings(config)):
        raise ConfigError(
            f"{checkpoint} was trained with other settings ({', '.join(other)})",
            expected=", ".join(f"{key} = {value}" for key, value in other.items()),
            fix="delete it to start afresh, or use these",
        )


def _differences(saved: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values in ``saved`` that ``given`` has not, by dotted keys; None for those that only ``given`` has."""
    found: dict[str, Any] = {}
    for key in sorted({*saved, *given}):
        one, other = saved.get(key), given.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found |= _differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found[prefix + key] = one
    return found


def _readable(checkpoint: Path) -> AbstractContextManager[None]:
    fix = "delete it to start afresh, or give another output folder"
    return readable(checkpoint, "a checkpoint of the same network", fix)


def _progress(history: History, config: TrainConfig) -> float:
    by_time = history.elapsed_s / config.seconds if config.seconds else 0.0
    by_steps = history.step / config.steps if config.steps else 0.0
    return max(by_time, by_steps)


def _lr_factor(step: int, done: float, config: TrainConfig) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    decay = config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine
    return min(1.0, (step + 1) / config.warmup_steps) * decay


@torch.no_grad()
def _update_ema(ema: nn.Module, module: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(ema.parameters()), list(module.parameters()), 1 - decay)  # few kernels on a GPU


def _agree(accelerator: Accelerator, seconds: float) -> float:
    """The slowest process's clock, so that all of them stop at the same step."""
    if accelerator.num_processes == 1:
        return seconds
    clock = torch.tensor([seconds], device=accelerator.device)
    return float(accelerator.gather(clock).max())


def _save(
    path: Path,
    module: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: History,
    settings: dict[str, object],
) -> None:
    tensors = {f"model.{k}": v for k, v in module.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    tensors["losses"] = torch.tensor(history.losses)  # the header, which holds the rest, must stay below 100 MB
    contiguous = {k: v.detach().contiguous() for k, v in tensors.items()}
    rest = json.dumps(asdict(replace(history, losses=[])))
    write_bytes(path, save(untied(contiguous), {"history": rest, "settings": json.dumps(settings)}))


def _restore(path: Path, module: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> History:
    with _readable(path):
        with safe_open(path, framework="pt") as file:
            history = History(**json.loads(file.metadata()["history"]))
            history.validation = [(seconds, step, value) for seconds, step, value in history.validation]
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        if "losses" in tensors:  # older versions kept them in the header
            history.losses = tensors["losses"].tolist()
        module.load_state_dict(_under(tensors, "model."))
        ema.load_state_dict(_under(tensors, "ema."))
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in _under(tensors, "optimizer.").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return history


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
