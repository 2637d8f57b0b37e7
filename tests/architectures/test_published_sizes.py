"""Published sizes: on the meta device, each has the published number of parameters."""

from __future__ import annotations

import pytest
import torch

from zoo import loading, registry
from zoo.architectures.core.modeling import ZooForCausalLM, ZooForMaskedLM

SIZES = [
    (name, preset, count)
    for name in registry.names("architectures")
    for preset, count in getattr(registry.load("architectures", name), "PARAMETERS", {}).items()
]


@pytest.mark.parametrize(("name", "size", "published"), SIZES, ids=lambda value: str(value))
def test_a_published_size_has_its_published_parameters(name: str, size: str, published: int) -> None:
    config = loading.config(name, size)
    cls = ZooForMaskedLM if encoder(config) else ZooForCausalLM
    with torch.device("meta"):
        model = cls(config)
    model.tie_weights()
    found = sum(parameter.numel() for parameter in model.parameters())
    assert abs(found - published) <= 0.01 * published, f"{found} parameters; published are {published}"


def encoder(config: object) -> bool:
    layers = config.layers or []  # type: ignore[attr-defined]
    mixers = (registry.get("mixers", layer["mixer"], "MODULE") for layer in layers if layer.get("mixer"))
    return any(mixer.encoder_only for mixer in mixers)
