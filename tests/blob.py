"""A network in the form of MediaPipe's whose answer is known: landmarks hang on the centre of brightness."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import openvino

RIGHT = (5, 8, 12, 14, 16, 24, 26, 28)  # of MediaPipe's 33
HIDDEN, DIM = 15, 13  # its left wrist and left elbow


def blob_network(path: Path) -> Path:
    """A network with MediaPipe's inputs and outputs whose landmarks hang on the centre of brightness of its input.

    Landmark k lies 3 k pixels below it, those of the right side 40 pixels to the right; two are hardly visible; a black
    picture has no person.
    """
    ops = openvino.opset13
    offsets = np.zeros((1, 39, 5), np.float32)
    offsets[0, :, 1], offsets[0, RIGHT, 0], offsets[0, :, 3] = 3 * np.arange(39), 40, 4
    offsets[0, HIDDEN, 3], offsets[0, DIM, 3] = math.log(0.09 / 0.91), math.log(0.11 / 0.89)
    image = ops.parameter([1, 256, 256, 3], np.float32)
    light = ops.reduce_sum(image, np.int64(3))
    total = ops.reduce_sum(light, np.array([1, 2]))
    centre = np.arange(256, dtype=np.float32) + 0.5
    y, x = (
        ops.divide(ops.reduce_sum(ops.multiply(light, grid), np.array([1, 2])), total)
        for grid in (centre[None, :, None], centre[None, None, :])
    )
    zero = ops.constant(np.zeros(1, np.float32))
    place = ops.reshape(ops.concat([x, y, zero, zero, zero], 0), np.array([1, 1, 5]), False)
    landmarks = ops.reshape(ops.add(place, offsets), np.array([1, 195]), False)
    person = ops.reshape(ops.clamp(total, 0.0, 1.0), np.array([1, 1]), False)
    results = [ops.result(landmarks), ops.result(person)]
    for result, name in zip(results, ("Identity", "Identity_1"), strict=True):
        result.input(0).get_source_output().get_tensor().set_names({name})
    openvino.save_model(openvino.Model(results, [image]), path, compress_to_fp16=False)
    return path
