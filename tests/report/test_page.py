"""The page as a parser sees it: self-contained, complete, escaped; pictures by their pixels."""

from __future__ import annotations

import base64
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from rpfm_edge.core.errors import ConfigError, InputError
from rpfm_edge.measure.metrics import statistics
from rpfm_edge.report.page import Evidence, error_map, format_number, write_report
from rpfm_edge.report.plots import Point, frontier_plot, frontier_png, histogram, loss_plot, smoothed, validation_plot

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
HOSTILE = """<script>alert("x")</script> & 'q' $\\frac$ {{ 7*7 }}"""
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags with attributes, text, and whether every tag that opens closes in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open, self.balanced = "", [], True
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.text += " "
        self.balanced = self.balanced and bool(self.open) and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def picture(level: int) -> np.ndarray:
    return np.random.default_rng(level).integers(0, 256, (16, 11, 3), dtype=np.uint8)


def summary(*values: float) -> dict:
    return {"psnr_db": statistics(values), "flip": statistics([v / 100 for v in values])}


def engine(backend: str, steps: int, p50_s: float, psnr_db: float) -> dict[str, Any]:
    quality = {"psnr_db": statistics([psnr_db])}
    return {
        "steps": steps,
        "precision": "int8",
        "backend": backend,
        "against_teacher": quality,
        "against_truth": quality,
        "frame": {"p50_s": p50_s, "p95_s": 2 * p50_s, "fps": 1 / p50_s},
        "engine_bytes": 2**21,
        "pareto": backend == "torch",
    }


def failed(words: str) -> dict[str, Any]:
    return {"steps": 4, "precision": "fp16", "backend": "openvino", "reason": f"too large {words}", "pareto": False}


def full(words: str = "words") -> Evidence:
    times = [0.030 + 0.0001 * (k % 7) for k in range(100)]
    return {
        "title": f"title {words}",
        "subtitle": f"subtitle {words}",
        "machine": {"cpu": words, "cores": 8, "usable_cores": 4, "memory_bytes": 2**34, "versions": {"numpy": words}},
        "headline": [
            {"group": "quality", "label": words, "value": 34.217, "unit": words, "note": words},
            {"group": "speed", "label": "rate", "value": 31.37, "unit": "FPS", "note": ""},
        ],
        "pictures": [
            {
                "title": words,
                "images": {f"teacher {words}": picture(1), "int8": picture(2)},
                "error_of": ("int8", f"teacher {words}"),
            }
        ],
        "drift": {
            "stages": [
                {"stage": "teacher", "against_truth": summary(21.0, 22.0, 23.0)},
                {
                    "stage": words,
                    "against_teacher": summary(31.0, 32.0, math.inf),
                    "against_truth": summary(20.0, 20.5, 21.0),
                    "pose": {"pck": statistics([0.5, 1.0, 1.0]), "pck_unsided": statistics([0.75, 1.0, 1.0])},
                    "detail": {"detail": statistics([0.25, 0.5, 0.875])},
                },
                {"stage": "film", "flicker": {"flicker": statistics([1.5, 2.0]), "motion": statistics([0.75, 1.0])}},
                {"stage": "ground truth", "flicker": {"flicker": statistics([0.5]), "motion": statistics([1.0])}},
            ],
            "missing": {"lpips": f"weights {words}"},
            "note": words,
        },
        "frontier": {
            "rows": [engine(words, 2, 0.05, 33.0), engine("torch", 1, 0.02, 31.0), failed(words)],
            "pairs": [[words, words]] * 3,
            "machine": {"cpu": words, "usable_cores": 4, "versions": {words: "1.0"}},
            "reference": {"steps": 8, "solver": "heun"},
            "rounds": 7,
        },
        "latency": [
            {"call": f"frame {words}", "name": words, "values_s": times},
            {"call": f"frame {words}", "name": "other", "values_s": [10 * t for t in times]},
            {"call": "prepare", "name": words, "values_s": [0.01] * 3},
        ],
        "losses": {words: [{"name": words, "steps": list(range(1000)), "values": [1 / (k + 1) for k in range(1000)]}]},
        "validation": {words: [[60 * k, 10 * k, 0.5 + 1 / (k + 1)] for k in range(9)]},
        "lineage": [
            {
                "stage": words,
                "config": {words: [words], "lr": 1e-4, "train": {"ema": {words: 0.5}, "seed": 0}},
                "tools": {words: words},
                "inputs": {words: "ab12"},
            }
        ],
        "method": {"commands": [words], "counts": {words: 64}, "seeds": {"noise": 1234}, "notes": [words]},
    }


def render(folder: Path, evidence: Evidence) -> tuple[str, Page]:
    write_report(folder / "report.html", evidence)
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    text, page = render(tmp_path, full())
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), (tag, name, value)
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"report.html"}


def test_the_page_is_well_formed_and_accessible(tmp_path: Path) -> None:
    text, page = render(tmp_path, full())
    assert text.startswith("<!doctype html>")
    assert page.balanced
    assert page.open == []
    assert page.all("html")[0]["lang"] == "en"
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a[name] for _, a in page.tags for name in ("href", "xlink:href") if name in a}
    assert {target[1:] for target in targets} <= set(ids)
    assert "prefers-color-scheme: dark" in text


def test_every_picture_is_there_pixel_by_pixel(tmp_path: Path) -> None:
    _, page = render(tmp_path, full())
    found = {image["alt"]: decode(image["src"] or "") for image in page.all("img")}
    assert np.array_equal(found["teacher words, words"], picture(1))
    assert np.array_equal(found["int8, words"], picture(2))
    assert np.array_equal(found["error: int8 − teacher words, words"], error_map(picture(2), picture(1)))
    assert len(found) == 4  # and the colour scale


def decode(uri: str) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(uri.partition(",")[2]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[:, :, ::-1]


def test_picture_files_are_embedded_as_they_are(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), picture(1)[:, :, ::-1])
    cv2.imwrite(str(tmp_path / "b.jpg"), picture(1)[:, :, ::-1])
    row = {"title": "files", "images": {"a": "a.png", "b": tmp_path / "b.jpg"}, "error_of": ("a", "b")}
    _, page = render(tmp_path, {"pictures": [row]})
    sources = [image["src"] or "" for image in page.all("img")]
    for source, name, kind in zip(sources, ("a.png", "b.jpg"), ("png", "jpeg"), strict=False):
        assert source.startswith(f"data:image/{kind};base64,")
        assert base64.b64decode(source.partition(",")[2]) == (tmp_path / name).read_bytes()
    lossy = cv2.imread(str(tmp_path / "b.jpg"))[:, :, ::-1]
    assert np.array_equal(decode(sources[2]), error_map(picture(1), np.ascontiguousarray(lossy)))


def test_pictures_that_cannot_be_shown(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name in ("text.png", "none.png"):
        with pytest.raises(InputError, match=f"{name} is no picture: expected a PNG or JPEG file"):
            render(tmp_path, {"pictures": [{"images": {"a": name}}]})
    with pytest.raises(InputError, match=r"cut\.png cannot be decoded"):
        render(tmp_path, {"pictures": [{"images": {"a": "cut.png", "b": "cut.png"}, "error_of": ("a", "b")}]})
    with pytest.raises(InputError, match="no picture 'c': expected one of"):
        render(tmp_path, {"pictures": [{"images": {"a": picture(1)}, "error_of": ("a", "c")}]})
    assert not (tmp_path / "report.html").exists()


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    _, page = render(tmp_path, full(HOSTILE))
    assert not page.all("script")
    assert page.balanced
    assert page.text.count(HOSTILE) >= 25  # everywhere it was given, plots and their legends too
    labels = {svg["aria-label"] for svg in page.all("svg")}
    losses = {f"{what}: {HOSTILE}" for what in ("loss curves", "validation")}
    assert labels == {f"times of frame {HOSTILE}", "times of prepare", *losses, "quality against speed"}
    names = {name for tag in ("p", "h1", "h2", "h3", "dd", "th", "img", "div") for a in page.all(tag) for name in a}
    assert names <= {"class", "id", "alt", "src", "role", "aria-label", "tabindex", "scope"}


def test_missing_sections_are_left_out(tmp_path: Path) -> None:
    _, page = render(tmp_path, {"title": "bare"})
    assert page.text.count("bare") == 2  # title and heading
    assert not page.all("h2") + page.all("table") + page.all("svg") + page.all("img") + page.all("a")
    for name in full():
        _, page = render(tmp_path, {name: full()[name]})  # each section stands alone
        assert page.balanced


def test_navigation_lists_the_sections_that_are_there(tmp_path: Path) -> None:
    _, page = render(tmp_path, {"method": {"seeds": {"noise": 1}}, "latency": full()["latency"]})
    assert [link["href"] for link in page.all("a")] == ["#speed", "#method"]
    assert [heading["id"] for heading in page.all("h2")] == ["speed", "method"]


def test_figures_are_the_ones_given(tmp_path: Path) -> None:
    _, page = render(tmp_path, full())
    words = " ".join(page.text.split())
    assert "34.2 words" in words
    assert "words 32.0 31.0 0.320 ∞ 3" in words  # PSNR: median, 5th percentile; FLIP: median, 95th; images
    assert "teacher 22.0 21.0 0.220 0.230 3" in words
    assert "Detail ↑ Flicker ↓ Flicker × truth Motion words 0.833 0.500 0.917 0.750 0.500 0.250 — — —" in words  # tails
    assert "film — — — 1.75 2.00 3.50 0.875 ground truth — — — 0.500 0.500 1.00 1.00" in words
    assert "4 of 8 usable" in words
    assert "16.0 GiB" in words
    assert "LPIPS: weights words" in words
    assert "words 30.3 30.6 30.6" in words  # ms: p50, p95, p99
    assert "1234" in words
    assert '["words"]' in words
    assert " ema:\n  words: 0.5\nseed: 0 " in page.text


def test_the_frontier_is_a_plot_and_a_table(tmp_path: Path) -> None:
    _, page = render(tmp_path, {"frontier": full()["frontier"]})
    words = " ".join(page.text.split())
    assert "Student, torch INT8 1 50.0 1.00 20.0 40.0 31.0 31.0 2.0 words INT8 2 20.0 – 50.0 100 33.0 33.0 2.0" in words
    assert "OpenVINO FP16 too large words 4 – – – – – – –" in words
    assert "Medians over 3 pairs" in words
    assert "8 Heun steps" in words
    assert "7 rounds, on words, 4 cores, words 1.0" in words
    assert [row.get("class") for row in page.all("tr")] == [None, "best", None, None]
    assert [svg["aria-label"] for svg in page.all("svg")] == ["quality against speed"]


def test_a_validation_curve_stands_beside_its_losses(tmp_path: Path) -> None:
    evidence: Evidence = {"losses": full()["losses"], "validation": {**full()["validation"], "alone": [[1.0, 2, 0.5]]}}
    _, page = render(tmp_path, evidence)
    labels = [svg["aria-label"] for svg in page.all("svg")]
    assert labels == ["loss curves: words", "validation: words", "validation: alone"]


def test_evidence_that_went_through_json_renders_the_same(tmp_path: Path) -> None:
    evidence = full()
    del evidence["pictures"]
    first, _ = render(tmp_path, evidence)
    second, _ = render(tmp_path, json.loads(json.dumps(evidence)))
    assert first == second


def test_an_unknown_section_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown section 'picture' of the evidence: expected some of"):
        render(tmp_path, {"picture": []})  # type: ignore[typeddict-unknown-key]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (34.217, "34.2"), (0.9123, "0.912"), (0.00051234, "0.000512"), (1234.5, "1,234"), (123, "123"), (5, "5"),
        (1.0, "1.00"), (100.0, "100"), (-2.5, "-2.50"), (0.0, "0"), (3.2e9, "3.2e+09"),
        (math.inf, "∞"), (-math.inf, "−∞"),
        (math.nan, "not a number"), (None, "—"), ("as is", "as is"), (99.96, "100"), (0, "0"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: float | str | None, text: str) -> None:
    assert format_number(value) == text


def test_error_map_is_black_at_zero_and_saturates_at_its_scale() -> None:
    a = np.zeros((2, 4, 3), np.uint8)
    b = a.copy()
    b[0, 1:] = np.array([[32], [64], [255]])
    b[1, 0] = (96, 0, 0)  # a mean of 32 over the channels
    colours = error_map(a, b)
    inferno = pytest.importorskip("matplotlib").colormaps["inferno"]
    expected = [np.rint(np.array(inferno(level)[:3]) * 255) for level in (0, 128, 255, 255)]
    assert np.abs(colours[0].astype(int) - expected).max() <= 3  # the same table, rounded otherwise
    assert np.array_equal(colours[1, 0], colours[0, 1])
    assert np.array_equal(error_map(b, a), colours)
    assert colours.dtype == np.uint8


def test_error_map_refuses_other_shapes() -> None:
    with pytest.raises(InputError, match=r"shapes \[2, 4, 3\] and \[3, 4, 3\] differ"):
        error_map(np.zeros((2, 4, 3), np.uint8), np.zeros((3, 4, 3), np.uint8))
    with pytest.raises(InputError, match=r"an image is float64\[2, 4, 3\]"):
        error_map(np.zeros((2, 4, 3)), np.zeros((2, 4, 3)))


def test_smoothing_keeps_constants_and_lines_and_skips_nan() -> None:
    line = np.arange(100.0)
    assert np.allclose(smoothed(np.full(50, 3.0)), 3)
    assert np.allclose(smoothed(line)[2:-2], line[2:-2])  # 5 values, centred: no lag
    assert smoothed(line)[0] == pytest.approx(1)  # the mean of 0, 1, 2
    line[10] = np.nan
    assert smoothed(line)[10] == pytest.approx(10)
    assert np.isnan(smoothed(np.full(5, np.nan))).all()


def test_plots_take_their_colours_from_the_page() -> None:
    curve = [[1.0, 10, 2.0], [2.0, 20, 1.0]]
    for svg in (
        histogram("times", {"a": [1, 2, 3]}),
        loss_plot("loss", {"a": ([0, 1], [2.0, 1.0])}),
        validation_plot("validation", curve),
        frontier_plot("frontier", [Point(10.0, 30.0, "a", "fp32", 1, True)]),
    ):
        assert "currentColor" in svg
        assert "var(--series-0)" in svg
        assert "#01fe" not in svg


def test_plots_of_awkward_series() -> None:
    assert histogram("equal", {"a": [0.01]}).startswith("<svg")
    assert histogram("zero", {"a": [0.0, 0.0]}).startswith("<svg")
    assert validation_plot("one", [[0.0, 0, 1.0]]).startswith("<svg")
    assert validation_plot("diverged", [[0.0, 0, 1.0], [9e3, 1, math.nan]]).startswith("<svg")
    assert loss_plot("negative", {"a": ([0, 1, 2], [1.0, -1.0, math.nan])}).startswith("<svg")
    points = loss_plot("long", {"a": (np.arange(100_000), np.ones(100_000))})
    assert len(points) < 60_000  # not one point per step


@pytest.mark.parametrize(("last_s", "unit"), [(100, "(s)"), (200, "(min)"), (11_000, "(h)")])
def test_training_time_has_a_unit_that_fits(last_s: float, unit: str) -> None:
    assert f"trained for {unit}" in validation_plot("v", [[0.0, 0, 2.0], [last_s, 10, 1.0]])


def test_the_frontier_marks_every_engine_once() -> None:
    engines = [Point(10.0 * k, 30.0 + k, "one" if k % 2 else "two", "int8", 10 + k, k == 5) for k in range(1, 6)]
    svg = Page(frontier_plot("frontier", engines)).text.split()
    assert [svg.count(str(10 + k)) for k in range(1, 6)] == [1] * 5
    assert [svg.count(name) for name in ("one", "two", "INT8")] == [1] * 3
    picture = cv2.imdecode(np.frombuffer(frontier_png(engines), np.uint8), cv2.IMREAD_COLOR)
    for colour in ((0x1F, 0x6F, 0xEB), (0xC2, 0x41, 0x0C)):  # two backends
        assert (picture[..., ::-1] == colour).all(axis=2).sum() > 200
