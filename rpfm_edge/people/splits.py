"""Which identities train, which judge: held-out means held-out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rpfm_edge.core.errors import InputError
from rpfm_edge.people.data import Split, hold_out, sample_root, shared_person
from rpfm_edge.people.deepfashion import has_split, open_split

VALIDATION_IDENTITIES, SEED = 40, 0


@dataclass(frozen=True, slots=True)
class Splits:
    """``training`` also serves distillation and calibration; ``validation`` chooses; ``test`` only ever judges."""

    training: Split
    validation: Split
    test: Split


def open_splits(data: str | Path) -> Splits:
    """The splits of a data set, identities disjoint, always the same.

    40 training identities (a tenth, if that is fewer) are kept for validation. A data set with a test split alone,
    such as the packaged ``sample``, is cut by identities: a third to judge (and validate), two thirds to train.

    Raises ``InputError`` if somebody is in both lists, besides what ``open_split`` and ``hold_out`` raise.
    """
    root = sample_root() if str(data) == "sample" else Path(data)
    test = open_split(root, "test")
    if not has_split(root, "train"):
        training, judged = hold_out(test, 1 / 3, SEED)
        return Splits(training, judged, judged)
    train = open_split(root, "train")
    if shared := shared_person(test.names, train.names):
        raise InputError(
            f"the person of {shared} is in the test and in the training list of {root}",
            expected="other people to judge than to train",
            fix="take that person out of one of the lists",
        )
    identities = len(set(train.identities.tolist()))
    training, validation = hold_out(train, min(VALIDATION_IDENTITIES, max(1, identities // 10)), SEED)
    return Splits(training, validation, test)


def sample_inputs(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """What a bundle is timed with: source (H, W, 3) uint8 and pose (18, 2) of the packaged sample's first test pair."""
    test = open_splits("sample").test
    source, target = (int(index) for index in test.pairs[0])
    return test.image(source, size), test.pose(target, size)
