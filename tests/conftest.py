"""A student small enough to be made in a second, and its exported graphs, for every test that needs a real chain.

64 × 48 pixels, latents 8 × 6, dim 32, depth 2, two steps. Layers that start at zero get random weights too, so that no
part of the network is hidden behind a closed gate.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rpfm_edge.core.artifact import Artifact

TINY_SIZE, TINY_STEPS = (64, 48), 2


@pytest.fixture(scope="module", autouse=True)
def _no_settling(request: pytest.FixtureRequest) -> Iterator[None]:
    """Times need not be right, but where timing itself is tested. As wide as a module, for what its fixtures time."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name != "test_clock.py":
            patch.setattr("rpfm_edge.measure.clock.SETTLE_S", 0.0)
        yield


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A student artifact; the session's tests share it, so copy it before changing it."""
    import torch

    from distill.autoencoder import SmallAutoencoder, SmallAutoencoderConfig
    from distill.rpfm import RPFM, RPFMConfig
    from distill.student import DistillConfig, Student, save_student

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = RPFM(RPFMConfig(dim=32, depth=2, heads=2, latent_size=(8, 6), step_embedding=True))
        student = Student(network, SmallAutoencoder(SmallAutoencoderConfig(widths=(8, 8, 16))))
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    out = tmp_path_factory.mktemp("tiny") / "student"
    return save_student(student, out, DistillConfig(steps=TINY_STEPS), TINY_SIZE, ())


@pytest.fixture(scope="session")
def tiny_graph(tiny_student: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The float graph artifact of ``tiny_student``, two steps unrolled."""
    from distill.export import export

    return export(tiny_student.path, tmp_path_factory.mktemp("tiny") / "graph")


@pytest.fixture(scope="session")
def aligned_student(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A student artifact of the kind that aligns the source with keypoints, of the same size and steps."""
    from distill.student import DistillConfig, save_student
    from tests.distill.tiny import toy_aligned_student

    out = tmp_path_factory.mktemp("aligned") / "student"
    return save_student(toy_aligned_student(), out, DistillConfig(steps=TINY_STEPS), TINY_SIZE, ())


@pytest.fixture(scope="session")
def aligned_graph(aligned_student: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The float graph artifact of ``aligned_student``, two steps unrolled."""
    from distill.export import export

    return export(aligned_student.path, tmp_path_factory.mktemp("aligned") / "graph")
