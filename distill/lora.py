"""Low-rank adapters (arXiv 2106.09685) by peft, for networks whose weights are too many to train; merged when done."""

from __future__ import annotations

from torch import nn

from distill.condition import Network
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.extras import require_module


def add(network: Network, rank: int) -> None:
    """Give every linear layer that would be trained an adapter, zero at first, and train these alone, and the step
    embedding, which is new."""
    require_module("peft", "lora")
    from peft import LoraConfig, inject_adapter_in_model

    new = {id(module) for module in (network.step.modules() if network.step is not None else ())}
    layers = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad and id(module) not in new
    ]
    if not layers:
        raise ConfigError("a network without linear layers to adapt", expected="some", fix="distill without lora")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), network)
    if network.step is not None:
        network.step.requires_grad_(True)


def merge(network: Network) -> None:
    """Add the adapters to the weights, and take them away."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            network.set_submodule(name, module.get_base_layer())


def checkpoint_gradients(network: nn.Module) -> None:
    """Let the modules that can, as diffusers' and transformers', compute again on the way back what takes memory."""
    names = ("enable_gradient_checkpointing", "gradient_checkpointing_enable")  # diffusers', transformers'
    switches = [getattr(module, name) for module in network.modules() for name in names if hasattr(module, name)]
    if not switches:
        raise ConfigError(
            "no module of this network can compute its activations again",
            expected="enable_gradient_checkpointing(), as diffusers' models have it",
            fix="leave gradient_checkpointing out, or take a smaller batch",
        )
    for switch in switches:
        switch()
