"""Plans on disk: damage, the one place where an engine fits, and the cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rpfm_edge.core import artifact
from rpfm_edge.core.errors import ArtifactError, BackendError, ParityError
from runtimes.trt import store
from runtimes.trt.api import Library
from runtimes.trt.build import Settings
from runtimes.trt.cuda import Device

ORIN = Device("Orin", "8.7", "12.6")
ADA = Device("NVIDIA RTX 4090", "8.9", "13.0")
FULL = Library(SimpleNamespace(), "tensorrt", "10.3.0", True, (), (), True, True, {}, (), False)
RTX = replace(FULL, name="tensorrt_rtx", version="1.7.1.116", targets={"8.9": "SM89"}, portable=True)
PLAN = b"ftrt" + bytes(range(256)) * 8


def record(library: Library = FULL, here: Device | None = ORIN, **options: Any) -> dict[str, Any]:
    return store.record(library, here, Settings(targets=() if here else ("8.6", "8.9")), "0" * 64, options)


@pytest.fixture
def written(engine: Path) -> Path:
    store.write(engine, PLAN, record())
    return engine


def test_what_is_written_is_read(written: Path) -> None:
    plan, made = store.read(written)
    assert plan == PLAN
    assert {key: made[key] for key in record()} == record()
    store.require_fit(written, made, FULL, ORIN)


@pytest.mark.parametrize("damage", [PLAN[:-1], PLAN[:100], b"", PLAN[:50] + b"?" + PLAN[51:]])
def test_a_plan_that_was_cut_or_altered(written: Path, damage: bytes) -> None:
    (written / "model.plan").write_bytes(damage)
    with pytest.raises(
        ArtifactError, match=r"model\.plan was cut short or altered: .* build the engine again: rpfm-edge"
    ):
        store.read(written)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", None])
def test_a_record_that_is_missing_or_damaged(written: Path, content: str | None) -> None:
    file = written / "plan.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(ArtifactError, match=r"or its record is missing or damaged .* build the engine again"):
        store.read(written)


@pytest.mark.parametrize(
    ("made", "library", "here", "fits"),
    [
        (record(), FULL, ORIN, True),
        (record(), FULL, replace(ORIN, name="Orin NX"), False),
        (record(), FULL, replace(ORIN, driver="12.8"), False),
        (record(), FULL, ADA, False),
        (record(), replace(FULL, version="10.3.1"), ORIN, False),
        (record(), RTX, ORIN, False),
        (record(version_compatible=True), replace(FULL, version="10.13.2"), ORIN, True),
        (record(version_compatible=True), replace(FULL, name="tensorrt_lean"), ORIN, True),
        (record(version_compatible=True), replace(FULL, version="10.2.0"), ORIN, False),
        (record(version_compatible=True), replace(FULL, version="11.0.0"), ORIN, False),
        (record(hardware_compatible="ampere_plus"), FULL, ADA, True),
        (record(hardware_compatible="ampere_plus"), FULL, replace(ADA, capability="7.5"), False),
        (record(hardware_compatible="ampere_plus"), FULL, replace(ADA, capability="12.0"), True),
        (record(hardware_compatible="same_compute_capability"), FULL, replace(ORIN, name="Orin NX"), True),
        (record(hardware_compatible="same_compute_capability"), FULL, ADA, False),
        (record(RTX, ADA), RTX, replace(ADA, name="NVIDIA L4", driver="13.1"), True),
        (record(RTX, ADA), RTX, ORIN, False),
        (record(RTX, None), RTX, ADA, True),
        (record(RTX, None), RTX, replace(ADA, capability="12.0"), False),
    ],
)
def test_where_a_plan_fits(engine: Path, made: dict[str, Any], library: Library, here: Device, fits: bool) -> None:
    if fits:
        store.require_fit(engine, made, library, here)
        return
    with pytest.raises(BackendError, match=r"was built for .* build it on this device: rpfm-edge build"):
        store.require_fit(engine, made, library, here)


def test_the_error_names_both_places(engine: Path) -> None:
    message = (
        r"model\.plan was built for Orin, driver 12\.6, tensorrt 10\.3\.0: "
        r"expected NVIDIA RTX 4090 \(8\.9\), driver 13\.0, tensorrt 10\.3\.0; build it on this device: "
        r"rpfm-edge build BUNDLE --target tensorrt --out BUNDLE\.$"
    )
    with pytest.raises(BackendError, match=message):
        store.require_fit(engine, record(), FULL, ADA)
    with pytest.raises(BackendError, match=r"built for compute capability \['8\.6', '8\.9'\], tensorrt_rtx 1\.7"):
        store.require_fit(engine, record(RTX, None), FULL, ORIN)


def test_the_command_names_the_bundle(tmp_path: Path) -> None:
    engine = tmp_path / "bundle" / "engines" / "torch-tensorrt" / "frame"
    engine.mkdir(parents=True)
    artifact.seal(tmp_path / "bundle", "bundle", {}, {}, ())
    bundle = tmp_path / "bundle"
    assert store.rebuild(engine) == f"rpfm-edge build {bundle} --target torch-tensorrt --out {bundle}"


def test_the_cache_gives_back_the_same_record_only(tmp_path: Path) -> None:
    made = record(optimization_level=3)
    assert store.cached(made) is None
    store.keep(made, PLAN)
    assert store.cached(json.loads(json.dumps(made))) == PLAN
    others = (
        record(optimization_level=2),
        record(FULL, replace(ORIN, driver="12.8"), optimization_level=3),
        record(replace(FULL, version="10.3.1"), optimization_level=3),
        {**made, "graph": "1" * 64},
    )
    assert [store.cached(other) for other in others] == [None] * len(others)
    (file,) = (tmp_path / "cache" / "tensorrt").glob("*.plan")
    file.write_bytes(PLAN[:-1])
    assert store.cached(made) is None


@pytest.mark.parametrize("tool", ["onnx", "torch"])
def test_a_plan_of_other_tools_is_not_taken_from_the_cache(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store.keep(record(), PLAN)
    assert store.cached(record()) == PLAN
    installed = artifact.tool_versions
    monkeypatch.setattr(artifact, "tool_versions", lambda *names: {**installed(*names), tool: "0.0.1"})
    assert store.cached(record()) is None


def test_without_a_place_for_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RPFM_EDGE_CACHE", str(tmp_path / "file"))
    store.keep(record(), PLAN)
    assert store.cached(record()) is None
    assert store.timing_file(FULL, ORIN) is None


def test_one_timing_cache_for_each_gpu_and_version() -> None:
    files = [
        store.timing_file(*place)
        for place in ((FULL, ORIN), (FULL, ADA), (replace(FULL, version="10.4.0"), ORIN), (FULL, ORIN))
    ]
    assert len(set(files)) == 3
    assert files[0] == files[3]
    assert store.timing_file(FULL, None) is None


def test_a_cached_plan_that_is_wrong_is_built_again(engine: Path) -> None:
    wrong, tried = b"ftrt of an older version", []

    def compare() -> None:
        tried.append(store.read(engine)[0])
        if tried[-1] == wrong:
            raise ParityError("wrong", expected="right", fix="build it")

    store.keep(record(), wrong)
    store.make(engine, record(), lambda: PLAN, compare)
    assert tried == [wrong, PLAN]
    assert store.cached(record()) == PLAN
    store.make(engine, record(), pytest.fail, compare)


def test_a_wrong_plan_is_not_cached(engine: Path) -> None:
    def compare() -> None:
        raise ParityError("wrong", expected="right", fix="build it")

    with pytest.raises(ParityError):
        store.make(engine, record(), lambda: PLAN, compare)
    assert store.cached(record()) is None
