"""The trajectory store: the teacher's guided paths from noise to image, solved once, kept in shards, resumable.

A shard is a pure function of (config, shard index): a store can be built in pieces, by several processes, after a kill,
and all students of a teacher can share it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from distill.batches import EncodedSplit
from distill.predictions import check_ends
from distill.resident import settle
from distill.teacher import Teacher, pose_kind, sample_teacher
from distill.weights import readable
from rpfm_edge.core.errors import ConfigError, InputError
from rpfm_edge.core.files import write_bytes, write_text
from rpfm_edge.core.flow import Solver
from rpfm_edge.core.progress import progress
from rpfm_edge.people.data import Split, draw_batch


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """How trajectories are made. ``grid`` intervals are kept; divisible by 8, so that 1, 2, 4 and 8 steps all fit.

    ``shards_per_solve``: solved as one batch, 8 on a GPU and 1 on a CPU if not given; the shards are the same.
    """

    trajectories: int
    grid: int = 8
    solver: Solver = "heun"
    sources_per_shard: int = 8
    targets_per_source: int = 8
    seed: int = 1
    shards_per_solve: int | None = None

    @property
    def shard_size(self) -> int:
        """Trajectories in one shard."""
        return self.sources_per_shard * self.targets_per_source

    @property
    def shards(self) -> int:
        """Number of shards of the whole store."""
        return -(-self.trajectories // self.shard_size)


def pictures_of(config: StoreConfig, split: Split) -> np.ndarray:
    """The indices of all pictures that the paths of a whole store need, in order."""
    drawn = [_draw(config, split, shard)[1] for shard in range(config.shards)]
    return np.unique(np.concatenate([array.ravel() for sources, targets, _ in drawn for array in (sources, targets)]))


def _draw(
    config: StoreConfig, split: Split, shard: int
) -> tuple[np.random.Generator, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The sources, targets and mirrorings of a shard, and the generator for what else is drawn for it."""
    rng = np.random.default_rng([config.seed, shard])
    return rng, draw_batch(split, config.sources_per_shard, config.targets_per_source, rng)


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
    """Make the missing shards in the folder ``out``, shared between processes.

    ``seconds`` bounds the solving of the whole store, that of earlier calls included. ``identity`` of the teacher (its
    digest, or the name of its factory) is kept with the store. Returns how many shards of the config are there now.
    """
    processes, data = processes or PartialState(), replace(data, pose=pose_kind(teacher))
    if config.grid % 8:
        raise ConfigError(f"a grid of {config.grid}", expected="a multiple of 8", fix="use 8 or 16")
    _check_meta(out, config, identity, data.split)
    mine = range(processes.process_index, config.shards, processes.num_processes)
    missing = [shard for shard in mine if not _shard(out, shard).exists()]
    if missing and getattr(teacher, "path", None) is None:
        _check_ends(teacher, data, config, processes.device)
    spent_s = _solved_s(_shards(out)) / processes.num_processes
    together = config.shards_per_solve or (8 if processes.device.type == "cuda" else 1)
    with progress("trajectories", total=len(mine)) as advance:
        for start in range(0, len(missing), together):
            if seconds is not None and spent_s >= seconds:
                break
            chosen = missing[start : start + together]
            spent_s += _make_shards(teacher, data, out, config, chosen, processes.device)
            done = len(mine) - len(missing) + start + len(chosen)
            advance(done, f"{config.shard_size * done} paths")
    return len(_shards(out, config))


def _check_ends(teacher: Teacher, data: EncodedSplit, config: StoreConfig, device: torch.device | str) -> None:
    """Of one pair: a velocity that is no number at noise, or leaps there, would spoil all paths."""
    sources, targets, flips = _draw(config, data.split, 0)[1]
    batch = data.batch(sources[:1], targets[:1, :1], flips[:1], device)
    condition = teacher.condition(batch.source, batch.pose)
    noise = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(config.seed)).to(device)
    check_ends(lambda x, t: teacher.velocity(x, t, condition), noise)


def _make_shards(
    teacher: Teacher,
    data: EncodedSplit,
    out: Path,
    config: StoreConfig,
    shards: list[int],
    device: torch.device | str,
) -> float:
    """Solve and write some shards; returns the seconds that it took, which are kept with them."""
    started = time.monotonic()
    solved = _solve_shards(teacher, data, config, shards, device)
    took_s = time.monotonic() - started
    for shard, tensors in zip(shards, solved, strict=True):
        write_bytes(_shard(out, shard), save(tensors, {"solved_s": str(took_s / len(shards))}))
    return took_s


def _shard(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.safetensors"


def _shards(folder: Path, config: StoreConfig | None = None) -> list[Path]:
    """The shards that are there, in order; with ``config`` those that belong to it, out of a larger store."""
    if config is None:
        return sorted(folder.glob("shard-*.safetensors"))
    return [file for index in range(config.shards) if (file := _shard(folder, index)).exists()]


def _solved_s(files: Iterable[Path]) -> float:
    total = 0.0
    for file in files:
        with _readable(file), safe_open(file, framework="pt") as opened:
            total += float((opened.metadata() or {}).get("solved_s", 0.0))
    return total


def _solve_shards(
    teacher: Teacher, data: EncodedSplit, config: StoreConfig, shards: list[int], device: torch.device | str
) -> list[dict[str, Tensor]]:
    """The tensors of each shard, all solved in one batch; noise is drawn on the CPU."""
    drawn, noises = [], []
    for shard in shards:
        rng, pairs = _draw(config, data.split, shard)
        drawn.append(pairs)
        noises.append(rng.standard_normal((config.shard_size, *teacher.latent_shape), dtype=np.float32))
    sources, targets, flips = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    batch, noise = data.batch(sources, targets, flips, device), torch.from_numpy(np.concatenate(noises)).to(device)
    kind = torch.device(device).type
    with torch.autocast(kind, torch.bfloat16, enabled=_fast_bfloat16(kind)):
        condition = teacher.condition(batch.source, batch.pose)
        states = sample_teacher(teacher, noise, condition, config.grid, config.solver)
    paths = torch.stack(states, dim=1).half().cpu().split(config.shard_size)
    return [
        {
            "states": states.contiguous(),
            "sources": torch.from_numpy(sources.repeat(config.targets_per_source).astype(np.int64)),
            "targets": torch.from_numpy(targets.ravel().astype(np.int64)),
            "flips": torch.from_numpy(flips.repeat(config.targets_per_source)),
        }
        for states, (sources, targets, flips) in zip(paths, drawn, strict=True)
    ]


def _fast_bfloat16(kind: str) -> bool:
    return kind == "cuda" or bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def _check_meta(out: Path, config: StoreConfig, identity: str, split: Split) -> None:
    """A store is of one teacher, data set and config; mixing shards of two would poison the student silently."""
    fields = {k: v for k, v in asdict(config).items() if k not in ("trajectories", "shards_per_solve")}  # it may grow
    meta, file = {"teacher": identity, "data": split.digest, **fields}, out / "store.json"
    if not file.exists():
        write_text(file, json.dumps(meta, indent=1))
    elif (saved := _read_meta(file)) != meta:
        raise ConfigError(
            f"{out} holds trajectories of another teacher, data set or config",
            expected=str(saved),
            fix="give another folder",
        )


def _read_meta(file: Path) -> dict[str, Any]:
    with readable(file, "what store.json of a store says", "delete its folder to solve the paths afresh"):
        meta: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return meta


def _readable(shard: Path) -> AbstractContextManager[None]:
    return readable(shard, "a whole shard", "delete it, and its paths are solved again")


def load_store(folder: Path, config: StoreConfig | None = None, device: torch.device | str = "cpu") -> Trajectories:
    """Read the shards into memory, or onto a GPU where they fit; of a larger store only those of ``config``."""
    files = _shards(folder, config)
    if not files:
        raise InputError(f"{folder} has no trajectories", expected="shard-*.safetensors", fix="build the store first")
    shards = []
    for file in files:
        with _readable(file):
            shards.append(load_file(file))
    merged = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
    return Trajectories(
        states=settle(merged["states"], device),
        sources=merged["sources"].numpy(),
        targets=merged["targets"].numpy(),
        flips=merged["flips"].numpy(),
        targets_per_source=_read_meta(folder / "store.json")["targets_per_source"],
    )
