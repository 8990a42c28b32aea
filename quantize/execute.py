"""Running an ONNX graph here, to record what flows through it and to compare it with another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from rpfm_edge.core.signature import Feeds


class Graph:
    """An ONNX graph on ONNX Runtime's CPU provider; ``threads`` 0 means all cores."""

    def __init__(self, model: Path | onnx.ModelProto, threads: int = 0) -> None:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.log_severity_level = 3
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        self._session = onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])

    def __call__(self, feeds: Feeds) -> np.ndarray:
        """The first output."""
        output: np.ndarray = self._session.run(None, dict(feeds))[0]
        return output

    def all(self, feeds: Feeds) -> list[np.ndarray]:
        """Every output, in the graph's order."""
        outputs: list[np.ndarray] = self._session.run(None, dict(feeds))
        return outputs

    def named(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Every output, by name."""
        return dict(zip((output.name for output in self._session.get_outputs()), self.all(feeds), strict=True))
