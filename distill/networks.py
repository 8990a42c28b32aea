"""Networks and codecs by their description in a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from distill import autoencoder as autoencoders
from distill.aligned import AlignedRPFM
from distill.condition import Network
from distill.contract import ContractNetwork, Parts, call_factory
from distill.rpfm import RPFM, RPFMConfig
from distill.small_decoder import SmallDecoder, SmallDecoderConfig, WithDecoder
from rpfm_edge.core.errors import ConfigError


def create_network(config: RPFMConfig) -> RPFM:
    """The kit's own network of a config, by the kind of its pose."""
    return AlignedRPFM(config) if config.pose == "keypoints" else RPFM(config)


def describe(network: Network, codec: nn.Module) -> dict[str, Any]:
    """The ``network`` and ``autoencoder`` of a manifest, which ``create`` makes the same architectures of."""
    described = network.describe()
    return {"network": described, "autoencoder": _describe_codec(codec, described.get("factory"))}


def _describe_codec(codec: nn.Module, factory: str | None) -> dict[str, Any]:
    if isinstance(codec, WithDecoder):
        encoder = _describe_codec(codec.encoder, factory)
        return {"kind": "with-decoder", "encoder": encoder, "decoder": asdict(codec.decoder.config)}
    if factory is None or autoencoders.is_known(codec):
        return autoencoders.describe(codec)
    return {"kind": "factory", "factory": factory}


def create(config: Mapping[str, Any]) -> tuple[Network, nn.Module]:
    """Network and codec that a manifest describes, without their trained weights. Those of a factory are made by it."""
    described, codec = dict(config["network"]), config["autoencoder"]
    if "factory" not in described:
        fields = {**described, "latent_size": tuple(described["latent_size"])}
        return create_network(RPFMConfig(**fields)), _create_codec(codec, None)
    parts = parts_of(described["factory"])
    network = ContractNetwork(parts, described["factory"])
    own = _create_codec(codec, parts)
    return network.as_student(True) if described["step_embedding"] else network, own


def _create_codec(described: Mapping[str, Any], parts: Parts | None) -> nn.Module:
    if described["kind"] == "with-decoder":
        encoder = _create_codec(described["encoder"], parts)
        return WithDecoder(encoder, SmallDecoder(SmallDecoderConfig(**described["decoder"])))
    if described["kind"] == "factory":
        codec: Any = (parts or parts_of(described["factory"])).codec
        return codec
    return autoencoders.create(dict(described))


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
