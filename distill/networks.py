"""Networks and codecs by their description in a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from distill import autoencoder as autoencoders
from distill.aligned import AlignedRPFM
from distill.condition import Network
from distill.contract import ContractNetwork, Parts, call_factory
from distill.rpfm import RPFM, RPFMConfig
from rpfm_edge.core.errors import ConfigError


def create_network(config: RPFMConfig) -> RPFM:
    """The kit's own network of a config, by the kind of its pose."""
    return AlignedRPFM(config) if config.pose == "keypoints" else RPFM(config)


def describe(network: Network, codec: nn.Module) -> dict[str, Any]:
    """The ``network`` and ``autoencoder`` of a manifest, which ``create`` makes the same architectures of."""
    described = network.describe()
    factory = described.get("factory")
    known = factory is None or autoencoders.is_known(codec)
    return {
        "network": described,
        "autoencoder": autoencoders.describe(codec) if known else {"kind": "factory", "factory": factory},
    }


def create(config: Mapping[str, Any]) -> tuple[Network, nn.Module]:
    """Network and codec that a manifest describes, without their trained weights. Those of a factory are made by it."""
    described, codec = dict(config["network"]), config["autoencoder"]
    if "factory" not in described:
        fields = {**described, "latent_size": tuple(described["latent_size"])}
        return create_network(RPFMConfig(**fields)), autoencoders.create(codec)
    parts = parts_of(described["factory"])
    network = ContractNetwork(parts, described["factory"])
    own = parts.codec if codec["kind"] == "factory" else autoencoders.create(codec)
    return network.as_student(True) if described["step_embedding"] else network, own


def parts_of(factory: str) -> Parts:
    """What a factory returns, where modules are needed."""
    parts = call_factory(factory)
    if not isinstance(parts, Parts):
        raise ConfigError(
            f"the factory {factory!r} returns a {type(parts).__name__}",
            expected="distill.contract.Parts",
            fix="restore the factory that this was made with",
        )
    return parts
