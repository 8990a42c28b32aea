"""Which units to quantize: those first that save the most time for the error that they bring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from quantize import layers
from quantize.sensitivity import Effect
from quantize.units import Unit, multiplications, units


def ordered(effects: Sequence[Effect], saved_s: Mapping[str, float]) -> list[str]:
    """Names by falling time saved per squared error, then what saves nothing by rising error.

    The errors of units add up (measured on xs: 38.8 dB by their sum, 38.6 dB together), so every beginning of this
    order is the best choice for its error, but for its last unit: the greedy solution of the knapsack problem.
    """
    useful = [effect for effect in effects if saved_s.get(effect.name, 0) > 0]
    idle = [effect for effect in effects if saved_s.get(effect.name, 0) <= 0]
    useful.sort(key=lambda effect: -saved_s[effect.name] / max(effect.mse, 1e-12))
    return [effect.name for effect in (*useful, *sorted(idle, key=lambda effect: effect.mse))]


def divided_by_work(frame: onnx.ModelProto, found: Sequence[Unit], saved_s: float) -> dict[str, float]:
    """``saved_s``, what all units save together, divided by their multiplications: for want of a profile."""
    counts = multiplications(frame)
    work = {unit.name: sum(counts[product] for product in unit.products) for unit in found}
    return {name: saved_s * count / sum(work.values()) for name, count in work.items()}


def divided_by_profile(found: Sequence[Unit], kernels: Sequence[tuple[Sequence[str], float]]) -> dict[str, float]:
    """Unit → seconds in the kernels that compute it; a kernel of several units counts for each in equal parts.

    Args:
        kernels: names of the nodes that a kernel computes, and its seconds. What ``qdq.insert`` writes is named after
            its product, so rounding counts for the unit that asked for it.
    """
    owner = {product: unit.name for unit in found for product in unit.products}
    seconds = dict.fromkeys((unit.name for unit in found), 0.0)
    for names, time_s in kernels:
        owners = {owner[product] for name in names for product in _prefixes(name) if product in owner}
        for name in owners:
            seconds[name] += time_s / len(owners)
    return seconds


def _prefixes(name: str) -> list[str]:
    """``a/b/c`` → itself, ``a/b``, ``a``."""
    parts = name.split("/")
    return ["/".join(parts[:end]) for end in range(len(parts), 0, -1)]


def default_units(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the units whose layers ``layers.plan`` quantizes, whatever the device."""
    planned = set(layers.plan(model, corrections=True).quantized)
    return tuple(unit.name for unit in units(model) if planned.issuperset(unit.products))


def grid(count: int, points: int = 8) -> list[int]:
    """How many of ``count`` units the candidates of a frontier quantize: evenly, all of them last."""
    return sorted({max(1, round(count * point / points)) for point in range(1, points + 1)}) if count else []
