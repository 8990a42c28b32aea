"""The network: sizes, the cached source, guidance dropout, and that a step embedding starts as nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from distill.condition import Source, per_target
from distill.rpfm import PRESETS, RPFM, RPFMConfig, patchify, preset, unpatchify
from rpfm_edge.core.errors import ConfigError

TINY = RPFMConfig(dim=32, depth=2, heads=2, latent_size=(8, 6))


def given(latent: torch.Tensor) -> Source:
    """Sources of which the network looks at the latents alone."""
    return Source(latent, torch.empty(0), torch.empty(0))


def random_network(config: RPFMConfig = TINY, seed: int = 0) -> RPFM:
    """A network whose zero-initialised layers are random too, so that nothing is hidden by a zero gate."""
    torch.manual_seed(seed)
    network = RPFM(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not name.startswith("step."):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize(("name", "millions"), [("s", 33), ("b", 132), ("l", 460)])
def test_presets_have_the_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        network = RPFM(preset(name, latent_channels=4))
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


def test_the_shipped_size_fits_ten_megabytes_in_fp16() -> None:
    with torch.device("meta"):
        network = RPFM(PRESETS["xs"])
    assert 2 * sum(p.numel() for p in network.parameters()) < 10e6


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'xl'"):
        preset("xl")


def test_patchify_round_trip() -> None:
    x = torch.randn(2, 5, 8, 6)
    torch.testing.assert_close(unpatchify(patchify(x, 2), 2, (8, 6)), x)
    assert patchify(x, 2)[0, 0].sort().values.equal(x[0, :, :2, :2].flatten().sort().values)


def test_cached_source_equals_joint_attention_written_out() -> None:
    """The network with cached keys and values against both streams run side by side with a mask."""
    network = random_network()
    x, pose, source = torch.randn(2, 8, 8, 6), torch.randn(2, 16, 8, 6), torch.randn(2, 8, 8, 6)
    t = torch.tensor([0.2, 0.9])
    with torch.no_grad():
        got = network(x, t, pose=pose, **network.source(given(source)))
        expected = masked_reference(network, x, t, pose, source)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def masked_reference(
    network: RPFM, x: torch.Tensor, t: torch.Tensor, pose: torch.Tensor, source: torch.Tensor
) -> torch.Tensor:
    """One sequence of source and target tokens; a mask keeps the source from seeing the target."""
    config = network.config
    target = network.embed(patchify(torch.cat([x, pose], 1), 2)) + network.position
    tokens = torch.cat([network.embed_source(patchify(source, 2)) + network.position, target], dim=1)
    count = config.tokens
    mask = torch.ones(2 * count, 2 * count, dtype=torch.bool)
    mask[:count, count:] = False
    conditions = F.silu(network.source_condition).expand(len(x), -1), F.silu(network.time(t))
    per_token = torch.cat([c[:, None].expand(-1, count, -1) for c in conditions], dim=1)
    for block in network.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(per_token).chunk(6, -1)
        q, k, v = block._heads(block.qkv(block.norm1(tokens) * (1 + scale1) + shift1))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        tokens = tokens + gate1 * block.proj((weights @ v).transpose(1, 2).flatten(2))
        tokens = tokens + gate2 * block.mlp(block.norm2(tokens) * (1 + scale2) + shift2)
    shift, scale = network.modulation(conditions[1])[:, None].chunk(2, -1)
    return unpatchify(network.head(network.norm(tokens[:, count:]) * (1 + scale) + shift), 2, config.latent_size)


def test_source_shared_by_several_targets() -> None:
    network = random_network()
    x, pose, source = torch.randn(4, 8, 8, 6), torch.randn(4, 16, 8, 6), torch.randn(2, 8, 8, 6)
    t = torch.full((4,), 0.5)
    with torch.no_grad():
        shared = network(x, t, pose=pose, **per_target(network.source(given(source)), 2))
        apart = network(x, t, pose=pose, **network.source(given(source.repeat_interleave(2, dim=0))))
    torch.testing.assert_close(shared, apart, atol=1e-5, rtol=1e-4)


def test_dropped_source_has_no_influence() -> None:
    network = random_network()
    keep = torch.tensor([True, False])
    with torch.no_grad():
        a, b = (network.source(given(torch.randn(2, 8, 8, 6)), keep)["source_kv"] for _ in range(2))
    torch.testing.assert_close(a[1], b[1])
    assert not torch.allclose(a[0], b[0])


def test_a_new_step_embedding_changes_nothing() -> None:
    teacher = random_network()
    student = RPFM(replace(TINY, step_embedding=True)).eval()
    student.load_state_dict(teacher.state_dict(), strict=False)
    x, pose, source, t = torch.randn(2, 8, 8, 6), torch.randn(2, 16, 8, 6), torch.randn(2, 8, 8, 6), torch.rand(2)
    with torch.no_grad():
        expected = teacher(x, t, pose=pose, **teacher.source(given(source)))
        made = student(x, t, torch.ones(2), pose=pose, **student.source(given(source)))
        torch.testing.assert_close(made, expected)
