"""A backend is its module, its row and its extra: one that is added so goes all the way."""

from __future__ import annotations

from pathlib import Path

import pytest

import runtimes
from rpfm_edge import api
from rpfm_edge.chain import build
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.backends import BACKENDS, Backend
from rpfm_edge.core.errors import ConfigError, ParityError
from rpfm_edge.recipe.load import load_recipe
from tests import fake_backend

ROW = Backend("tests.fake_backend", ("numpy",), "fake", "Somebody's Engine", ("numpy",))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "fake", ROW)


@pytest.mark.usefixtures("fake")
def test_it_is_diagnosed_and_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert api.doctor()["backends"]["fake"] is None
    monkeypatch.setitem(BACKENDS, "fake", Backend("tests.fake_backend", ("no_such_library",), "fake", "", ()))
    assert "run: pip install 'rpfm-edge[fake]'" in api.doctor()["backends"]["fake"]


@pytest.mark.usefixtures("fake")
def test_a_recipe_takes_its_options(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    text = "out = 'runs'\n[student]\nartifact = 'student:xs'\n[build]\ntargets = ['fake']\n[build.fake]\nthreads = {}\n"
    recipe.write_text(text.format(2))
    assert load_recipe(recipe).build.options_of("fake") == {"threads": 2}
    recipe.write_text(text.format(3))
    with pytest.raises(ConfigError, match=r"\[build\.fake\]: fake option threads is 3"):
        load_recipe(recipe)


@pytest.mark.usefixtures("fake")
def test_it_is_built_compared_and_timed(tiny_graph: Artifact, tmp_path: Path) -> None:
    made = api.build(tiny_graph.path, tmp_path / "bundle", "fake", {"fake": {"threads": 1}})
    assert made.config["backends"] == {"fake": {"threads": 1}}
    found = api.bench(made.path, runs=3, seconds=0.01)
    assert [one["backend"] for one in found["backends"]] == ["fake"]
    assert found["backends"][0]["frame"]["p50_s"] > 0


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("backend", ["fake", "openvino", "onnxruntime", "torch"])
def test_an_engine_that_computes_something_else_is_refused(
    tiny_graph: Artifact, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every backend compares what it has built with what is known."""
    if reason := runtimes.why_not(backend):
        pytest.skip(reason)
    known = build.record(tiny_graph)
    assert known is not None
    monkeypatch.setattr(build, "record", lambda graph: {**known, "image": 255 - known["image"]})
    with pytest.raises(ParityError, match="computes image of graph frame wrongly"):
        api.build(tiny_graph.path, tmp_path / "wrong", backend)
    assert not (tmp_path / "wrong").exists()


def test_the_module_has_the_contract_of_the_others() -> None:
    verbs = ("build", "open", "profile", "checked_options", "versions")
    assert all(callable(getattr(fake_backend, verb)) for verb in verbs)
