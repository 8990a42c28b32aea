"""What TensorRT's verbose builder log says about the layers of an engine (``ProfilingVerbosity.DETAILED``)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

PRODUCTS = {"gemm": "Gemm", "correlation": "Conv"}  # its name for a matrix product, a convolution → ONNX's


def int8_products(log: Iterable[str]) -> dict[str, int]:
    """ONNX kind → kernels whose first input and first weights are INT8."""
    return products(log, "Int8")


def products(log: Iterable[str], kind_of_data: str) -> dict[str, int]:
    """ONNX kind → kernels whose first input and first weights are of that type: "Int8", "FP8" or "FP4E2M1"."""
    found: Counter[str] = Counter()
    for line in layers(log):
        kind = _kind(line)
        inputs, _, rest = line.partition("Constants: [")
        types = [re.search(r"Datatype: (\w+)", part) for part in (inputs, rest)]
        if kind in PRODUCTS and all(match and match.group(1) == kind_of_data for match in types):
            found[PRODUCTS[kind]] += 1
    return dict(found)


def fused_attention(log: Iterable[str]) -> int:
    """Kernels that compute a whole attention: both products and the softmax between them."""
    return sum("_mha_" in line.partition(",")[0] for line in layers(log))


def layers(log: Iterable[str]) -> list[str]:
    """One line for each layer of the engine."""
    return [line for message in log for line in message.splitlines() if re.match(r"Name: \S+, LayerType: ", line)]


def _kind(line: str) -> str:
    match = re.search(r"LayerType: (\w+)", line)
    return match.group(1) if match else ""
