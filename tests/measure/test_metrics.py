"""Metrics against scikit-image, closed forms, a torch transcription of LPIPS, and hand-computed values."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from rpfm_edge.core.errors import ArtifactError, BackendError, ConfigError, InputError
from rpfm_edge.core.extras import import_extra
from rpfm_edge.measure.budget import Budget
from rpfm_edge.measure.lpips import lpips_distance
from rpfm_edge.measure.metrics import (
    compare,
    flip,
    missing_metrics,
    paired_bootstrap,
    psnr_db,
    sqnr_db,
    ssim,
    statistics,
)


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a = np.kron(rng.integers(0, 256, (8, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    return a, np.clip(a + rng.normal(0, 12, a.shape), 0, 255).astype(np.uint8)


def flat(level: int, shape: tuple[int, ...] = (32, 24, 3)) -> np.ndarray:
    return np.full(shape, level, np.uint8)


def test_psnr_is_the_one_of_scikit_image(pair: tuple[np.ndarray, np.ndarray]) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    assert psnr_db(*pair) == pytest.approx(metrics.peak_signal_noise_ratio(*pair, data_range=255), abs=1e-9)


def test_psnr_by_hand() -> None:
    assert psnr_db(flat(10), flat(11)) == pytest.approx(20 * math.log10(255))
    assert psnr_db(flat(255), flat(0)) == pytest.approx(0, abs=1e-12)  # and no wrap-around of uint8
    assert psnr_db(flat(7), flat(7)) == math.inf


def test_ssim_of_flat_images_is_its_luminance_term() -> None:
    c1 = (0.01 * 255) ** 2
    assert ssim(flat(100), flat(150)) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1), abs=1e-6)
    assert ssim(flat(9), flat(9)) == pytest.approx(1)


def test_ssim_against_its_definition(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """The formula of Wang et al. with an 11 x 11 Gaussian window, summed by hand at one pixel at a time."""
    grid = np.arange(-5, 6)
    window = np.exp(-(grid[:, None] ** 2 + grid**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for channel in range(3):
        x, y = (image[..., channel].astype(float) for image in pair)
        for i in range(5, x.shape[0] - 5):
            for j in range(5, x.shape[1] - 5):
                u, v = (z[i - 5 : i + 6, j - 5 : j + 6] for z in (x, y))
                mu, nu = (window * u).sum(), (window * v).sum()
                vu, vv = (window * u * u).sum() - mu**2, (window * v * v).sum() - nu**2
                cov = (window * u * v).sum() - mu * nu
                c1, c2 = 2.55**2, 7.65**2
                values.append((2 * mu * nu + c1) * (2 * cov + c2) / ((mu**2 + nu**2 + c1) * (vu + vv + c2)))
    assert ssim(*pair) == pytest.approx(np.mean(values), abs=1e-6)


def test_flip_orders_distances_and_knows_black_from_white(pair: tuple[np.ndarray, np.ndarray]) -> None:
    pytest.importorskip("flip_evaluator")
    assert flip(pair[0], pair[0]) == 0
    assert flip(flat(0), flat(255)) == pytest.approx(0.9676, abs=1e-3)  # the authors' value for black and white
    distances = [flip(flat(100), flat(100 + step)) for step in (1, 5, 20, 80)]
    assert all(near < far for near, far in pairwise(distances))


@pytest.mark.parametrize("metric", [psnr_db, ssim, flip])
def test_images_that_do_not_pair_are_refused(metric) -> None:
    with pytest.raises(InputError, match=r"shapes \[32, 24, 3\] and \[16, 24, 3\] differ"):
        metric(flat(0), flat(0, (16, 24, 3)))
    with pytest.raises(InputError, match=r"an image is float32\[32, 24, 3\]: expected uint8 \[H, W, 3\]"):
        metric(flat(0), flat(0).astype(np.float32))
    with pytest.raises(InputError, match=r"an image is uint8\[32, 24\]"):
        metric(flat(0)[..., 0], flat(0)[..., 0])


def test_ssim_needs_its_window() -> None:
    with pytest.raises(InputError, match="the images are 10 x 24 pixels: expected at least 11 x 11"):
        ssim(flat(0, (10, 24, 3)), flat(0, (10, 24, 3)))


def test_sqnr_by_hand() -> None:
    assert sqnr_db([3, 4], [3, 5]) == pytest.approx(10 * math.log10(25))
    assert sqnr_db([[3], [4]], [[3], [4]]) == math.inf
    assert sqnr_db([0, 0], [0, 1]) == -math.inf
    with pytest.raises(InputError, match="differ"):
        sqnr_db([1, 2], [1, 2, 3])


def test_sqnr_of_uniform_quantization_gains_six_db_per_bit() -> None:
    signal = np.random.default_rng(0).uniform(-1, 1, 100_000)

    def quantized(bits: int) -> np.ndarray:
        return (np.floor(signal * 2 ** (bits - 1)) + 0.5) / 2 ** (bits - 1)

    assert sqnr_db(signal, quantized(8)) == pytest.approx(8 * 20 * math.log10(2), abs=0.05)


@pytest.fixture
def lpips_file(tmp_path: Path) -> Path:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    state, before = {}, 3
    for k, (name, after, size) in enumerate(LAYERS):
        scale = (2 / (before * size * size)) ** 0.5
        state[f"net.{name}.weight"] = torch.randn(after, before, size, size, generator=generator) * scale
        state[f"net.{name}.bias"] = torch.randn(after, generator=generator) * 0.1
        state[f"lin{k}.model.1.weight"] = torch.rand(1, after, 1, 1, generator=generator)
        before = after
    save_file(state, tmp_path / "lpips.safetensors")
    return tmp_path / "lpips.safetensors"


LAYERS = (("slice1.0", 64, 11), ("slice2.3", 192, 5), ("slice3.6", 384, 3), ("slice4.8", 256, 3), ("slice5.10", 256, 3))


def test_lpips_against_torch(pair: tuple[np.ndarray, np.ndarray], lpips_file: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file
    from torch.nn import functional

    state = load_file(lpips_file)

    def features(image: np.ndarray) -> list:
        shift, scale = (torch.tensor(v)[:, None, None] for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
        x = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1 - shift) / scale
        found = []
        for (name, _, size), stride in zip(LAYERS, (4, 1, 1, 1, 1), strict=True):
            if name in ("slice2.3", "slice3.6"):
                x = functional.max_pool2d(x, 3, 2)
            weight, bias = state[f"net.{name}.weight"], state[f"net.{name}.bias"]
            x = functional.relu(functional.conv2d(x, weight, bias, stride, 2 if size > 3 else 1))
            found.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    expected = sum(
        functional.conv2d((x - y) ** 2, state[f"lin{k}.model.1.weight"]).mean().item()
        for k, (x, y) in enumerate(zip(features(pair[0]), features(pair[1]), strict=True))
    )
    assert lpips_distance(*pair, lpips_file) == pytest.approx(expected, rel=1e-5)
    assert lpips_distance(pair[0], pair[0], lpips_file) == 0


def test_lpips_weights_come_from_the_variable(
    pair: tuple[np.ndarray, np.ndarray], lpips_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RPFM_EDGE_LPIPS", raising=False)
    assert missing_metrics()["lpips"] == "weights not at hand (set RPFM_EDGE_LPIPS)"
    assert "lpips" not in compare([pair[0]], [pair[1]])
    with pytest.raises(ConfigError, match="LPIPS has no weights"):
        compare([pair[0]], [pair[1]], ["lpips"])
    monkeypatch.setenv("RPFM_EDGE_LPIPS", str(lpips_file))
    assert "lpips" not in missing_metrics()
    assert compare([pair[0]], [pair[1]], ["lpips"])["lpips"]["values"] == [lpips_distance(*pair, lpips_file)]
    monkeypatch.setenv("RPFM_EDGE_LPIPS", str(lpips_file.with_name("none")))
    with pytest.raises(ConfigError, match=r"RPFM_EDGE_LPIPS names .*none, which is no file"):
        missing_metrics()


def test_lpips_files_that_cannot_be_used(pair: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    (tmp_path / "bad").write_bytes(b"not a safetensors file")
    with pytest.raises(ArtifactError, match="bad cannot be read"):
        lpips_distance(*pair, tmp_path / "bad")
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "other")
    with pytest.raises(ArtifactError, match=r"other has no net\.slice1\.0\.weight"):
        lpips_distance(*pair, tmp_path / "other")
    with pytest.raises(InputError, match="expected at least 32 x 32"):
        lpips_distance(flat(0, (16, 64, 3)), flat(0, (16, 64, 3)), tmp_path / "other")


def test_a_missing_library_names_its_extra() -> None:
    with pytest.raises(BackendError, match=r"nowhere is not installed .*pip install 'rpfm-edge\[validate\]'"):
        import_extra("nowhere.at.all", "validate")


def test_a_module_of_ours_names_the_library_that_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_of_ours.py").write_text("import nowhere.at.all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BackendError, match=r"^nowhere is not installed \(No module named 'nowhere'\)"):
        import_extra("module_of_ours", "webrtc")


def test_compare_pairs_images_in_order() -> None:
    summary = compare([flat(10), flat(10)], [flat(11), flat(12)], ["psnr_db", "ssim"])
    first, second = 20 * math.log10(255), 20 * math.log10(255 / 2)
    assert summary["psnr_db"]["values"] == pytest.approx([first, second])
    assert summary["psnr_db"]["median"] == summary["psnr_db"]["mean"] == pytest.approx((first + second) / 2)
    assert list(summary) == ["psnr_db", "ssim"]


def test_compare_refuses_what_it_cannot_pair() -> None:
    with pytest.raises(InputError, match="2 and 1 images: expected as many of each"):
        compare([flat(0)] * 2, [flat(0)])
    with pytest.raises(InputError, match="0 and 0 images"):
        compare([], [])
    with pytest.raises(ConfigError, match="unknown metric 'pnsr'"):
        compare([flat(0)], [flat(0)], ["pnsr"])


def test_tails_are_measured_values_even_among_infinities() -> None:
    found = statistics([*range(1, 101)])
    assert (found["p05"], found["p95"], found["median"]) == (5, 95, 50.5)
    infinite = statistics([math.inf, math.inf, 30.0])
    assert (infinite["p05"], infinite["p95"], infinite["median"]) == (30.0, math.inf, math.inf)


def test_bootstrap_interval_holds_the_true_difference_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        common = rng.normal(30, 5, 40)  # what the pairing takes out
        low, high = paired_bootstrap(common + rng.normal(0.5, 1, 40), common, seed=trial, rounds=500)
        hits += low <= 0.5 <= high
        assert high - low < 1.2  # far below 4 * 5 / sqrt(40), the width without pairing
    assert 0.90 <= hits / 300 <= 0.98


def test_bootstrap_is_reproducible_and_refuses_what_it_cannot_pair() -> None:
    assert paired_bootstrap([1, 2, 4], [1, 1, 1], 3) == paired_bootstrap([1, 2, 4], [1, 1, 1], 3)
    assert paired_bootstrap([3, 4], [1, 2], 0) == (2, 2)
    with pytest.raises(InputError, match="1 and 1 values: expected as many of each, at least two"):
        paired_bootstrap([1], [1], 0)
    with pytest.raises(InputError, match="a difference is not finite"):
        paired_bootstrap([math.inf, 1], [1, 1], 0)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_budget_from_toml(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.toml", "[model]\nsize = 1\n[drift]\npsnr_db_min = 30.0\nflip_max = 0.1\n")
    assert Budget.load(recipe) == Budget(psnr_db_min=30.0, flip_max=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[drift]\npsnr_min = 30", "\\[drift\\] has 'psnr_min': expected one of \\['psnr_db_min'"),
        ("[drift]\nssim_min = 'high'", "sets ssim_min = 'high': expected a finite number"),
        ("[drift]\nssim_min = true", "sets ssim_min = True"),
        ("[drift]\nssim_min = nan", "sets ssim_min = nan"),
        ("[other]", "has no table \\[drift\\]"),
        ("drift = 3", "has no table \\[drift\\]"),
        ("[drift", "cannot be read .*: expected a TOML file"),
    ],
)
def test_budgets_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Budget.load(write(tmp_path / "recipe.toml", text))


def test_a_budget_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read"):
        Budget.load(tmp_path / "none.toml")


def test_budget_names_metric_measured_and_limit() -> None:
    summary = {"psnr_db": statistics([28.5]), "ssim": statistics([0.9]), "flip": statistics([0.25])}
    assert Budget(psnr_db_min=28.5, ssim_min=0.9, flip_max=0.25).check(summary) == []
    assert Budget(psnr_db_min=30, flip_max=0.1).check(summary) == [
        "psnr_db median 28.5 is below the limit 30 (psnr_db_min)",
        "flip median 0.25 is above the limit 0.1 (flip_max)",
    ]


def test_budget_limits_the_mean_of_pck_and_flicker() -> None:
    summary = {"pck": statistics([1, 1, 0.25]), "flicker": statistics([1, 1, 4])}
    assert Budget(pck_min=0.75, flicker_max=2).check(summary) == []
    assert Budget(pck_min=0.76, flicker_max=1.9).check(summary) == [
        "pck mean 0.75 is below the limit 0.76 (pck_min)",
        "flicker mean 2 is above the limit 1.9 (flicker_max)",
    ]
    assert Budget.from_dict({"pck_min": 0.9}).check({}) == ["pck was not measured, the limit is 0.9 (pck_min)"]
    assert Budget(flicker_max=9).check({"flicker": statistics([math.nan])})


def test_budget_limits_the_median_of_detail() -> None:
    summary = {"detail": statistics([0.1, 0.5, 0.6])}
    assert Budget(detail_min=0.5).check(summary) == []
    assert Budget(detail_min=0.51).check(summary) == ["detail median 0.5 is below the limit 0.51 (detail_min)"]


def test_budget_never_passes_what_was_not_measured() -> None:
    assert Budget(lpips_max=0.1).check({}) == ["lpips was not measured, the limit is 0.1 (lpips_max)"]
    assert len(Budget(ssim_min=0.9, flip_max=0.1).check({n: statistics([math.nan]) for n in ("ssim", "flip")})) == 2
