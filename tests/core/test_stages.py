"""Stages: made once, and again when something that counts has changed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from rpfm_edge.core import artifact, shipped, stages
from rpfm_edge.core.stages import Stages, identity


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


def test_an_artifact_that_is_not_whole_is_made_again(tmp_path: Path) -> None:
    records, out, file = Stages(tmp_path), tmp_path / "made", tmp_path / "made" / "weights.bin"

    def make() -> None:
        with artifact.replacing_folder(out, "graph") as folder:
            (folder / "weights.bin").write_bytes(b"weights")
            artifact.seal(folder, "graph", {}, {}, ())

    def fresh() -> bool:
        return records.once("export", None, {}, out, make)[1]

    assert [fresh(), fresh()] == [True, False]
    file.write_bytes(b"Weights")  # of the same size
    assert [fresh(), file.read_bytes(), fresh()] == [True, b"weights", False]
    file.unlink()
    assert [fresh(), file.read_bytes(), fresh()] == [True, b"weights", False]


def test_a_stage_is_run_again_for_any_of_its_results(tmp_path: Path) -> None:
    records, out, page, pictures = Stages(tmp_path), tmp_path / "out", tmp_path / "page", tmp_path / "pictures"

    def make() -> None:
        pictures.mkdir(exist_ok=True)
        for file in (out, page, pictures / "0.png", pictures / "1.png"):
            file.write_text(file.name)

    def fresh() -> bool:
        return records.once("report", None, {}, out, make, also=[page, pictures])[1]

    assert [fresh(), fresh()] == [True, False]
    page.unlink()
    assert [fresh(), page.read_text(), fresh()] == [True, "page", False]
    (pictures / "1.png").write_text("another")
    assert [fresh(), (pictures / "1.png").read_text(), fresh()] == [True, "1.png", False]
    shutil.rmtree(pictures)
    assert [fresh(), (pictures / "0.png").read_text(), fresh()] == [True, "0.png", False]
    (pictures / ".folder").touch()  # a file browser's
    assert not fresh()


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
    assert identity("teacher:xs") == identity(shipped.resolve("teacher:xs")) != "teacher:xs"
    for name in ("package.module:factory", "no_such_module:factory", "sys:exit", "sample"):  # no file to know them by
        assert identity(name) == name


def test_a_factory_is_known_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "teachers.py").write_text("def factory(): return 1\n")
    made, out = list[int](), tmp_path / "out"

    def run() -> bool:
        def make() -> None:
            made.append(1)
            out.write_text("made")

        inputs: dict[str, str | Path] = {"teacher": "some_package.teachers:factory"}
        return Stages(tmp_path).once("distill", None, inputs, out, make)[1]

    assert [run(), run()] == [True, False]
    (package / "teachers.py").write_text("def factory(): return 2\n")
    assert [run(), run()] == [True, False]
    assert len(made) == 2
