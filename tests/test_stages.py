"""Stages: made once, and again when something that counts has changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from rpfm_edge import stages
from rpfm_edge.stages import Stages, identity


class Stage:
    """A stage that copies its input; ``made`` counts how often it did."""

    def __init__(self, folder: Path) -> None:
        self.source, self.out, self.made = folder / "source", folder / "out", 0
        self.source.write_text("a")
        self.stages = Stages(folder)

    def run(self, config: object = 1, tools: Sequence[str] = ("torch",)) -> bool:
        return self.stages.once("copy", config, {"source": self.source}, self.out, self._make, tools)[1]

    def _make(self) -> None:
        self.out.write_text(self.source.read_text())
        self.made += 1


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_it_is_made_once(stage: Stage) -> None:
    assert [stage.run(), stage.run(), stage.run()] == [True, False, False]
    assert stage.made == 1


def test_it_is_made_again_when_config_input_or_result_changed(stage: Stage) -> None:
    stage.run()
    assert stage.run(config=2)
    stage.source.write_text("b")
    assert stage.run(config=2)
    assert stage.out.read_text() == "b"
    stage.out.write_text("damaged")
    assert stage.run(config=2)
    assert not stage.run(config=2)


def test_a_library_counts_only_where_it_is_named(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "1"}
    monkeypatch.setattr(stages, "tool_versions", lambda *names: {name: versions[name] for name in names})
    stage.run(tools=())
    versions["torch"] = "2"
    assert not stage.run(tools=())
    stage.run(tools=["torch"])
    assert not stage.run(tools=["torch"])
    versions["torch"] = "3"
    assert stage.run(tools=["torch"])


def test_unfinished_work_is_continued_or_thrown_away(tmp_path: Path) -> None:
    records, work = Stages(tmp_path), tmp_path / "work"
    for key, there in (("a", False), ("a", True), ("b", False), ("a", False)):
        assert records.keep("train", key, work) == work
        assert (work / "begun").exists() == there
        work.mkdir(exist_ok=True)
        (work / "begun").touch()


def test_identities(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("content")
    copy = tmp_path / "copy"
    copy.write_text("content")
    assert identity(file) == identity(copy) != identity(tmp_path)
    assert identity("teacher:xs") == identity(stages.assets.resolve("teacher:xs")) != "teacher:xs"
    assert identity("package.module:factory") == "package.module:factory"
