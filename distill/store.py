"""The trajectory store: the teacher's guided paths from noise to image, solved once, kept in shards, resumable.

A shard is a pure function of (config, shard index): a store can be built in pieces, by several processes, after a kill.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save
from torch import Tensor

from distill.batches import EncodedSplit
from distill.teacher import Teacher
from rpfm_edge.artifact import write_bytes, write_text
from rpfm_edge.data import draw_batch
from rpfm_edge.errors import ConfigError, InputError
from rpfm_edge.flow import Solver, solve, time_grid
from rpfm_edge.progress import progress


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """How trajectories are made. ``grid`` intervals are kept; divisible by 8, so that 1, 2, 4 and 8 steps all fit."""

    trajectories: int
    grid: int = 8
    solver: Solver = "heun"
    sources_per_shard: int = 8
    targets_per_source: int = 8
    seed: int = 1

    @property
    def shard_size(self) -> int:
        """Trajectories in one shard."""
        return self.sources_per_shard * self.targets_per_source

    @property
    def shards(self) -> int:
        """Number of shards of the whole store."""
        return -(-self.trajectories // self.shard_size)


@dataclass(frozen=True, slots=True)
class Trajectories:
    """A loaded store: ``states[i, k]`` is trajectory i at t = k / grid."""

    states: Tensor  # (n, grid + 1, C, h, w) float16
    sources: np.ndarray  # (n,) image indices
    targets: np.ndarray  # (n,)
    flips: np.ndarray  # (n,) bool
    targets_per_source: int


@torch.no_grad()
def build_store(
    teacher: Teacher,
    identity: str,
    data: EncodedSplit,
    out: Path,
    config: StoreConfig,
    seconds: float | None = None,
    processes: PartialState | None = None,
) -> int:
    """Make the missing shards in the folder ``out``, shared between processes; stop early after ``seconds``.

    ``identity`` of the teacher (its digest, or the name of its factory) is kept with the store. Returns how many
    shards are there now.
    """
    processes = processes or PartialState()
    rank, world, device = processes.process_index, processes.num_processes, processes.device
    if config.grid % 8:
        raise ConfigError(f"a grid of {config.grid}", expected="a multiple of 8", fix="use 8 or 16")
    _check_meta(out, config, identity)
    started = time.monotonic()
    mine = range(rank, config.shards, world)
    with progress("trajectories", total=len(mine)) as advance:
        for done, shard in enumerate(mine):
            path = out / f"shard-{shard:05d}.safetensors"
            if not path.exists():
                if seconds is not None and time.monotonic() - started > seconds:
                    break
                write_bytes(path, save(_solve_shard(teacher, data, config, shard, device)))
            advance(done + 1, f"{config.shard_size * (done + 1)} paths")
    return len(list(out.glob("shard-*.safetensors")))


def _solve_shard(
    teacher: Teacher, data: EncodedSplit, config: StoreConfig, shard: int, device: torch.device | str
) -> dict[str, Tensor]:
    rng = np.random.default_rng([config.seed, shard])
    sources, targets, flips = draw_batch(data.split, config.sources_per_shard, config.targets_per_source, rng)
    batch = data.batch(sources, targets, flips, device)
    shape = (len(batch.pose), *teacher.latent_shape)
    noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(device)
    kind = torch.device(device).type
    with torch.autocast(kind, torch.bfloat16, enabled=_fast_bfloat16(kind)):
        condition = teacher.condition(batch.source, batch.pose)
        states = solve(
            lambda x, t: teacher.velocity(x, t, condition).float(), noise, time_grid(config.grid), config.solver
        )
    repeats = config.targets_per_source
    return {
        "states": torch.stack(states, dim=1).half().cpu(),
        "sources": torch.from_numpy(sources.repeat(repeats).astype(np.int64)),
        "targets": torch.from_numpy(targets.ravel().astype(np.int64)),
        "flips": torch.from_numpy(flips.repeat(repeats)),
    }


def _fast_bfloat16(kind: str) -> bool:
    return kind == "cuda" or bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def _check_meta(out: Path, config: StoreConfig, identity: str) -> None:
    """A store is of one teacher and one config; mixing shards of two would poison the student silently."""
    fields = {k: v for k, v in asdict(config).items() if k != "trajectories"}  # a store may grow
    meta = {"teacher": identity, **fields}
    file = out / "store.json"
    if not file.exists():
        write_text(file, json.dumps(meta, indent=1))
    elif json.loads(file.read_text(encoding="utf-8")) != meta:
        raise ConfigError(
            f"{out} holds trajectories of another teacher or config", expected=str(meta), fix="give another folder"
        )


def load_store(folder: Path) -> Trajectories:
    """Read every shard into memory."""
    files = sorted(folder.glob("shard-*.safetensors"))
    if not files:
        raise InputError(f"{folder} has no trajectories", expected="shard-*.safetensors", fix="build the store first")
    shards = [load_file(file) for file in files]
    merged = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
    meta = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    return Trajectories(
        states=merged["states"],
        sources=merged["sources"].numpy(),
        targets=merged["targets"].numpy(),
        flips=merged["flips"].numpy(),
        targets_per_source=meta["targets_per_source"],
    )
