"""One training loop for autoencoder, teacher and students: time or step budget, EMA, bf16, resume, several processes.

A batch is a pure function of (seed, step, rank), so a resumed run sees what the uninterrupted one would have seen.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rpfm_edge.artifact import write_bytes
from rpfm_edge.errors import ArtifactError, ConfigError
from rpfm_edge.progress import progress

LossFunction = Callable[[nn.Module, int, np.random.Generator], Tensor]


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
    save_every_s: float = 60.0


@dataclass(slots=True)
class History:
    """Where a run stands: steps done, seconds spent training, and the loss of each step."""

    step: int = 0
    elapsed_s: float = 0.0
    losses: list[float] = field(default_factory=list)


def fit(
    module: nn.Module, loss: LossFunction, config: TrainConfig, checkpoint: Path, title: str, cpu: bool = False
) -> tuple[nn.Module, History]:
    """Minimise ``loss(module, step, rng)`` and return the EMA of the module with the run's history.

    Resumes from ``checkpoint`` (one safetensors file) if it exists, and saves there every ``save_every_s`` seconds
    and at the end. Learning rate: linear warm-up, then cosine over the budget.
    """
    if config.seconds is None and config.steps is None:
        raise ConfigError("a training run without a budget", expected="seconds or steps", fix="give one of them")
    accelerator = Accelerator(cpu=cpu)
    module = module.to(accelerator.device).train()
    ema = deepcopy(module).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    history = History()
    if checkpoint.exists():
        history = _restore(checkpoint, module, ema, optimizer, _settings(config))
    model, optimizer = accelerator.prepare(module, optimizer)

    begun = saved = time.monotonic()
    elapsed_before = history.elapsed_s
    with progress(title, total=1000) as advance:
        while (done := _progress(history, config)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * _lr_factor(history.step, done, config)
            rng = np.random.default_rng([config.seed, history.step, accelerator.process_index])
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                value = loss(model, history.step, rng)
            accelerator.backward(value)
            accelerator.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _update_ema(ema, module, min(config.ema, (1 + history.step) / (10 + history.step)))

            history.losses.append(float(accelerator.reduce(value.detach(), "mean")))
            history.step += 1
            history.elapsed_s = _agree(accelerator, elapsed_before + time.monotonic() - begun)
            advance(1000 * _progress(history, config), f"loss {np.mean(history.losses[-50:]):.4f}")
            if not math.isfinite(history.losses[-1]):
                raise ConfigError(
                    f"{title}: the loss is {history.losses[-1]} at step {history.step}",
                    expected="a finite loss",
                    fix=f"lower the learning rate; the last good state is kept in {checkpoint}",
                )
            if accelerator.is_main_process and time.monotonic() - saved > config.save_every_s:
                _save(checkpoint, module, ema, optimizer, history, _settings(config))
                saved = time.monotonic()
    if accelerator.is_main_process:
        _save(checkpoint, module, ema, optimizer, history, _settings(config))
    accelerator.wait_for_everyone()
    return ema, history


def _settings(config: TrainConfig) -> dict[str, object]:
    """What a resumed run must share with the one that it continues: everything but the budget."""
    return {k: v for k, v in asdict(config).items() if k not in ("seconds", "steps", "save_every_s")}


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
    for average, value in zip(ema.parameters(), module.parameters(), strict=True):
        average.lerp_(value, 1 - decay)


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
    record = {"step": history.step, "elapsed_s": history.elapsed_s, "losses": history.losses}
    contiguous = {k: v.detach().contiguous() for k, v in tensors.items()}
    write_bytes(path, save(contiguous, {"history": json.dumps(record), "settings": json.dumps(settings)}))


def _restore(
    path: Path, module: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, object]
) -> History:
    try:
        with safe_open(path, framework="pt") as file:
            history = History(**json.loads(file.metadata()["history"]))
            saved = json.loads(file.metadata()["settings"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        module.load_state_dict(_under(tensors, "model."))
        ema.load_state_dict(_under(tensors, "ema."))
    except Exception as error:
        raise ArtifactError(
            f"{path} does not fit this run ({str(error).splitlines()[0]})",
            expected="a checkpoint of the same network",
            fix="delete it to start afresh, or give another output folder",
        ) from None
    if saved != json.loads(json.dumps(settings)):
        raise ConfigError(
            f"{path} was trained with other settings",
            expected=str(saved),
            fix="delete it to start afresh, or use these",
        )
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in _under(tensors, "optimizer.").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return history


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
