"""Classifier-free guidance: a weighted sum of velocities, each of which may go without some of the conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.flow import guidance_scale


@dataclass(frozen=True, slots=True)
class Guidance:
    """``v = v_null + w(t) (v_cond - v_null)``; schedules in ``flow.guidance_scale``."""

    scale: float = 1.5
    schedule: str = "constant"


@dataclass(frozen=True, slots=True)
class Branch:
    """One evaluation of the network: its weight, a number or a function of t, and the names of the tensors that it goes
    without. The weights of a teacher's branches add up to 1.

    CFLD's three (arXiv 2402.18078), with scales p of the pose and s of the source, are
    ``Branch(1 - p, ("pose", "source")), Branch(p - s, ("source",)), Branch(s)``.
    """

    weight: float | Callable[[float], float]
    without: tuple[str, ...] = ()

    def at(self, t: float) -> float:
        """Its weight at time t."""
        return self.weight(t) if callable(self.weight) else self.weight


def branches(guidance: Guidance | tuple[Branch, ...], names: Iterable[str]) -> tuple[Branch, ...]:
    """The branches of a guidance, of a network that is conditioned on tensors of these names."""
    every = tuple(names)
    if isinstance(guidance, Guidance):
        if guidance.scale == 1.0:
            return (Branch(1.0),)

        def scale(t: float) -> float:
            return guidance_scale(t, guidance.scale, guidance.schedule)

        return Branch(scale), Branch(lambda t: 1 - scale(t), every)
    _check(guidance, every)
    return guidance


def _check(given: tuple[Branch, ...], names: tuple[str, ...]) -> None:
    total = sum(branch.at(0.5) for branch in given)
    if abs(total - 1) > 1e-6:
        raise ConfigError(
            f"the weights of the guidance add up to {total:g} at t = 0.5", expected="1", fix="correct the weights"
        )
    for name in (name for branch in given for name in branch.without):
        if name not in names:
            raise ConfigError(
                f"a branch of the guidance goes without {name!r}",
                expected=f"one of {sorted(names)}",
                fix="name a tensor that source or pose gives",
            )
