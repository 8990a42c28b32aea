"""Other people's teachers: what a factory brings, and the network that the kit makes of it.

A factory returns ``Parts``: modules, not a black box. So the student can start as a copy of the teacher's network, with
its weights and whatever it is conditioned on, and both graphs are made of the teacher's own modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from distill.autoencoder import Autoencoder
from distill.condition import Network, Source, Tensors, with_missing
from distill.guidance import Branch, Guidance
from distill.predictions import Adapted
from distill.rpfm import ScalarEmbedding
from rpfm_edge.core import shipped
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.signature import PoseKind
from rpfm_edge.people.image import Fit

NO_GUIDANCE = Guidance(1.0)
SourceFunction = Callable[[Tensor, Tensor, Tensor], Tensors]
PoseFunction = Callable[[Tensor], Tensors]
Predict = Callable[[Tensor, Tensor], Tensor]
PathFunction = Callable[[Predict, Tensor, Sequence[float]], list[Tensor]]


@dataclass(frozen=True)
class Parts:
    """A teacher as a factory gives it.

    Attributes:
        network: ``network(x, t, **tensors)`` → (B, C, h, w) velocity dx/dt at (B, C, h, w) and times (B,), t = 0 noise
            and t = 1 the image, without guidance. ``predictions.Adapted`` makes one of a network that predicts
            something else, on times of its own.
        codec: encodes and decodes (``autoencoder.Autoencoder``); ``autoencoder.Pixels()`` where there is none.
        size: (H, W) of the pictures that the codec sees.
        source: (S, 3, H, W) in [-1, 1], their latents and (S, 18, 2) keypoints (``MISSING`` where there is none) →
            named tensors with S in front, once per person.
        source_keypoints: whether ``source`` looks at the keypoints; a bundle asks for them then.
        pose: (B, 18, 2) keypoints, ``MISSING`` where there is none, or (B, 3, H, W) skeletons in [-1, 1], as
            ``pose_kind`` says → named tensors with B in front, for every frame. ``distill.drawing`` has the usual maps.
        guidance: folded into the stored paths, so the student needs none.
        null: what stands for the tensors of both where a branch of the guidance goes without them; zeros if not given.
        path: the teacher's own sampler: ``path(predict, noise, times)`` → the states at these times, where
            ``predict(x, τ)`` is what the network itself gives, guidance included (``schedulers.sampler_path`` does it
            for diffusers' schedulers). Without it eight steps of Heun's rule.
        time_embedding: the module of ``network``, by name, whose (B, D) output may carry a step size as well. Without
            it diffusers' ``TimestepEmbedding`` is looked for, and where there is none the student knows the steps that
            it is made for, and no others.
        fit: how pictures meet ``size``, those of the data and a user's: with margins, or stretched.
    """

    network: nn.Module
    codec: Autoencoder
    size: tuple[int, int]
    source: SourceFunction
    pose: PoseFunction
    pose_kind: PoseKind = "keypoints"
    source_keypoints: bool = False
    guidance: Guidance | tuple[Branch, ...] = NO_GUIDANCE
    null: Callable[[Tensors], Tensors] | None = None
    path: PathFunction | None = None
    time_embedding: str | None = None
    fit: Fit = "pad"

    def __post_init__(self) -> None:
        for name, kind in (("network", nn.Module), ("source", Callable), ("pose", Callable)):
            if not isinstance(getattr(self, name), kind):  # type: ignore[arg-type]
                raise ConfigError(
                    f"the teacher's {name} is a {type(getattr(self, name)).__name__}",
                    expected="an nn.Module" if name == "network" else "a module or a function",
                    fix="see docs/own_teacher.md",
                )
        for name, choices in (("pose_kind", get_args(PoseKind)), ("fit", get_args(Fit))):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"the teacher has {name} {getattr(self, name)!r}", expected=f"one of {choices}", fix="correct it"
                )
        for missing in ("encode", "decode", "latent_channels", "factor"):
            if not hasattr(self.codec, missing):
                raise ConfigError(
                    f"the teacher's codec has no {missing}",
                    expected="encode, decode, latent_channels and factor",
                    fix="wrap it: autoencoder.KLAutoencoder does for diffusers' AutoencoderKL",
                )
        if any(pixels % self.codec.factor for pixels in self.size):
            raise ConfigError(
                f"the teacher's size {list(self.size)} is no multiple of {self.codec.factor}, the codec's factor",
                expected="sides that the codec's factor divides",
                fix="correct size, or the codec's factor",
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        height, width = self.size
        return self.codec.latent_channels, height // self.codec.factor, width // self.codec.factor


class WithStep(nn.Module):
    """A time embedding that carries a step size, too: by what is added to it, zero at first."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        width = [module for module in embedding.modules() if isinstance(module, nn.Linear)][-1].out_features
        self.step = ScalarEmbedding(width, zero=True)
        self.d: Tensor | None = None  # (B,), set before every call

    def forward(self, *args: Any, **options: Any) -> Tensor:
        """What the embedding gives, and what the step size adds."""
        embedded: Tensor = self.embedding(*args, **options)
        return embedded if self.d is None else embedded + self.step(self.d).to(embedded.dtype)


class ContractNetwork(Network):
    """``Parts`` as a ``condition.Network``: a teacher's network, or its copy that becomes a student."""

    frozen = ("source_encoder",)

    def __init__(self, parts: Parts, factory: str = "") -> None:
        super().__init__()
        self.network, self.source_encoder, self.pose_encoder = (
            parts.network,
            _as_module(parts.source),
            _as_module(parts.pose),
        )
        self.pose_kind, self.source_keypoints = parts.pose_kind, parts.source_keypoints
        self.latent_shape, self.size, self.fit = parts.latent_shape, parts.size, parts.fit
        self.factory, self._null, self._embedding = factory, parts.null, parts.time_embedding
        self._step = ""  # the name of what embeds the step size, within the network

    @property
    def step(self) -> WithStep | None:  # type: ignore[override]
        """What embeds the step size: a part of the network, once it is there."""
        return self.network.get_submodule(self._step) if self._step else None

    def source(self, source: Source, keep: Tensor | None = None) -> Tensors:
        """The teacher's tensors of S sources; the null's where ``keep`` (S,) is False."""
        tensors: Tensors = self.source_encoder(source.pixels, source.latent, with_missing(source.joints))
        if keep is None:
            return tensors
        nothing = self.null(tensors)
        return {
            name: torch.where(keep.view(-1, *[1] * (tensor.ndim - 1)), tensor, nothing[name])
            for name, tensor in tensors.items()
        }

    def pose(self, pose: Tensor, tensors: Tensors) -> Tensors:
        """The teacher's tensors of B poses."""
        made: Tensors = self.pose_encoder(pose)
        return made

    def null(self, tensors: Tensors) -> Tensors:
        """The teacher's own, or zeros."""
        return super().null(tensors) | (self._null(tensors) if self._null else {})

    def start(self, noise: Tensor, tensors: Tensors) -> Tensor:
        """The noise, in the scale of the network's first time."""
        start = getattr(self.network, "start", None)
        return start(noise) if start else noise

    @property
    def t_first(self) -> float:
        """Where the flow begins on the network's own axis: above 0 where its noise never drowns the image wholly."""
        return float(getattr(self.network, "t_first", 0.0))

    def forward(self, x: Tensor, t: Tensor, d: Tensor | None = None, **tensors: Tensor) -> Tensor:
        """The velocity, or the average one over [t, t + d]; our times 0 … 1 are the network's from its first one on."""
        if self.step is not None:
            self.step.d = torch.zeros_like(t) if d is None else d
        share = 1 - self.t_first
        velocity: Tensor = self.network(x, self.t_first + share * t, **tensors)
        return share * velocity

    @property
    def own(self) -> nn.Module:
        """The network itself, which predicts whatever it does at times of its own."""
        return self.network.network if isinstance(self.network, Adapted) else self.network

    def own_time(self, tau: float) -> float:
        """Our time, from 0 to 1, of one of its own."""
        if not isinstance(self.network, Adapted):
            return tau
        schedule, first = self.network.schedule, self.t_first
        order = np.argsort(schedule.times)
        return (float(np.interp(tau, schedule.times[order], schedule.t[order])) - first) / (1 - first)

    def as_student(self, step: bool) -> ContractNetwork:
        """A copy; with ``step`` one whose time embedding carries a step size, where there is a time embedding."""
        student = deepcopy(self).requires_grad_(True)
        for name in self.frozen:
            getattr(student, name).requires_grad_(False)
        embedding = student._time_embedding() if step and student.step is None else None
        if embedding is not None:
            student.network.set_submodule(embedding, WithStep(student.network.get_submodule(embedding)))
            student._step = embedding
        return student

    def describe(self) -> dict[str, Any]:
        """The factory, which brings the architecture."""
        return {"factory": self.factory, "step_embedding": self.step is not None}

    def int8_layers(self) -> dict[str, nn.Module]:
        """The linear layers and convolutions of the network, by name, but for those of the time embedding."""
        layers = self.network.named_modules(prefix="network")
        folded = f"network.{self._time_embedding()}."  # a constant of the graph
        return {
            name: layer
            for name, layer in layers
            if isinstance(layer, nn.Linear | nn.Conv2d) and not name.startswith(folded)
        }

    def _time_embedding(self) -> str | None:
        """The name of the module that embeds the time, within the network: as told, or diffusers', if there is one."""
        names = [name for name, _ in self.network.named_modules()]
        if self._embedding is None:
            found = [n for n, m in self.network.named_modules() if type(m).__name__ == "TimestepEmbedding"]
            return found[0] if len(found) == 1 else None
        if self._embedding not in names:
            near = get_close_matches(self._embedding, names, 3, 0.3)
            raise ConfigError(
                f"the teacher's network has no module {self._embedding!r}, its time_embedding",
                expected=f"such as {near}" if near else "the name of one of its modules",
                fix="correct time_embedding, or leave it out",
            )
        return self._embedding


class _Function(nn.Module):
    """A function where a module is asked for."""

    def __init__(self, function: Callable[..., Tensors]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *given: Tensor) -> Tensors:
        return self.function(*given)


def _as_module(part: Callable[..., Tensors]) -> nn.Module:
    return part if isinstance(part, nn.Module) else _Function(part)


def is_factory(spec: str | Path) -> bool:
    """Whether ``spec`` names a factory rather than a folder or a shipped artifact."""
    text = str(spec)
    return text not in shipped.shipped() and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*", text) is not None


def call_factory(spec: str) -> Any:
    """Import ``package.module`` and call its ``factory()``."""
    module, name = spec.split(":")
    try:
        factory: Callable[[], Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"teacher {spec!r} cannot be imported ({error})",
            expected=f"a shipped name out of {sorted(shipped.shipped())}, a folder, or package.module:factory",
            fix="check the spelling and PYTHONPATH",
        ) from None
    return factory()
