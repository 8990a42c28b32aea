"""Signatures: what fits, what is refused and how, and the way through JSON."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpfm_edge.core.errors import SignatureError
from rpfm_edge.core.signature import Signature, TensorSpec

SIGNATURE = Signature(
    (TensorSpec("pose", (1, 4, 3, 3), "uint8"), TensorSpec("noise", (2, 5), "float32")),
    (TensorSpec("image", (1, 4, 3, 3), "uint8"),),
)
SPECS = st.builds(
    TensorSpec,
    st.text(max_size=8),
    st.lists(st.integers(0, 1000), max_size=5).map(tuple),
    st.sampled_from(["float32", "float16", "uint8", "int64"]),
)
SIDES = st.lists(SPECS, max_size=4).map(tuple)


def good() -> dict[str, np.ndarray]:
    return {"noise": np.zeros((2, 5), np.float32), "pose": np.zeros((1, 4, 3, 3), np.uint8)}


def test_feeds_that_fit_in_any_order() -> None:
    SIGNATURE.check(good())
    SIGNATURE.check(dict(reversed(good().items())))
    Signature((), ()).check({})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda f: f.pop("pose"),
            r"^got inputs \['noise'\]: expected exactly \['noise', 'pose'\]; rename, add or drop",
        ),
        (lambda f: f.update(image=f["pose"]), r"^got inputs \['image', 'noise', 'pose'\]: expected exactly"),
        (lambda f: f.clear(), r"^got inputs \[\]: expected exactly"),
        (
            lambda f: f.update(noise=f["noise"].astype("float64")),
            r"^input 'noise' is float64\[2, 5\]: expected float32\[2, 5\]; resize or cast it",
        ),
        (lambda f: f.update(noise=f["noise"].T), r"^input 'noise' is float32\[5, 2\]: expected float32\[2, 5\]"),
        (lambda f: f.update(noise=f["noise"][None]), r"^input 'noise' is float32\[1, 2, 5\]: expected"),
        (lambda f: f.update(noise=f["noise"].astype(">f4")), r"^input 'noise' is >f4\[2, 5\]: expected"),
        (lambda f: f.update(pose=f["pose"].view("int8")), r"^input 'pose' is int8\[1, 4, 3, 3\]: expected uint8"),
    ],
)
def test_feeds_that_do_not_fit(edit: Callable[[dict[str, np.ndarray]], None], message: str) -> None:
    feeds = good()
    edit(feeds)
    with pytest.raises(SignatureError, match=message):
        SIGNATURE.check(feeds)


def test_input_by_name() -> None:
    assert SIGNATURE.input("noise") == TensorSpec("noise", (2, 5), "float32")


@given(SIDES, SIDES)
def test_json_and_back(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    signature = Signature(inputs, outputs)
    assert Signature.from_json(json.loads(json.dumps(signature.to_json()))) == signature
