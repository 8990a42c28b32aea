"""Names, shapes and dtypes at a graph boundary, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rpfm_edge.core.errors import SignatureError

GIVEN_JOINTS = "keypoints"  # the second input of a ``prepare`` that looks at the source's joints, (1, 18, 2) float32
JOINTS, SCORES = "joints", "joint_scores"  # its outputs that tell where they are (1, 18, 2), and how surely (1, 18)
PoseKind = Literal["skeleton", "keypoints"]  # a drawn picture, or the keypoints themselves

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: static shape, numpy dtype name (``"float32"``, ``"uint8"``)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and outputs of a graph, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def check(self, feeds: Feeds) -> None:
        """Raise ``SignatureError`` unless ``feeds`` has exactly the inputs, with their shapes and dtypes."""
        names = [spec.name for spec in self.inputs]
        if set(feeds) != set(names):
            raise SignatureError(
                f"got inputs {sorted(feeds)}", expected=f"exactly {sorted(names)}", fix="rename, add or drop inputs"
            )
        for spec in self.inputs:
            array = feeds[spec.name]
            if not isinstance(array, np.ndarray):
                raise SignatureError(
                    f"input {spec.name!r} is a {type(array).__name__}",
                    expected=f"a numpy array, {spec}",
                    fix="convert it",
                )
            if array.shape != spec.shape or array.dtype != spec.dtype:
                raise SignatureError(
                    f"input {spec.name!r} is {array.dtype}{list(array.shape)}",
                    expected=str(spec),
                    fix="resize or cast it before the call; this layer never does it for you",
                )

    def input(self, name: str) -> TensorSpec:
        """The spec of input ``name``."""
        return {spec.name: spec for spec in self.inputs}[name]

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts, for the manifest."""
        return {
            side: [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype} for s in specs]
            for side, specs in (("inputs", self.inputs), ("outputs", self.outputs))
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Signature:
        """The inverse of ``to_json``."""

        def specs(side: str) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(s["name"], tuple(s["shape"]), s["dtype"]) for s in data[side])

        return cls(specs("inputs"), specs("outputs"))
