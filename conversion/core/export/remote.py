"""A model with its own modeling file: for transformers' `trust_remote_code`, where no class of transformers fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import zoo
from zoo import registry
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.formats import Canonical
from zoo.architectures.core.modeling import model_class
from zoo.conversion.core.export.bundle import bundle, flat

FILE = "modeling_zoo"
CONFIG, MODELING, ADOPT = (f"zoo.architectures.core.{name}" for name in ("zoo_config", "modeling", "adopt"))
TAIL = """
ZooConfig = {config}.ZooConfig
ZooModel = {modeling}.ZooModel
{name} = {modeling}.{name}
for _class in (ZooConfig, ZooModel, {name}):
    _class.__qualname__ = _class.__name__
{adopt}.register()
{modeling}.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING["zoo_recurrent"] = {modeling}.create_recurrent_attention_mask
"""


def code(source: Canonical) -> str:
    """The text of the modeling file for a checkpoint."""
    name = model_class(source.config).__name__
    names = {key: flat(module) for key, module in (("config", CONFIG), ("modeling", MODELING), ("adopt", ADOPT))}
    parts = {kind: sorted(_parts(source.decoder, kind)) for kind in ("mixers", "channels", "blocks")}
    mixers = " and ".join(parts["mixers"])
    tail = TAIL.format(name=name, **names)
    return bundle((CONFIG, MODELING, ADOPT), parts, title=f"A language model of {mixers}.", tail=tail)


def config(source: Canonical) -> dict[str, Any]:
    """The `config.json`: ours, with the classes of the modeling file."""
    name = model_class(source.config).__name__
    head = "AutoModelForMaskedLM" if "Masked" in name else "AutoModelForCausalLM"
    auto = {"AutoConfig": "ZooConfig", "AutoModel": "ZooModel", head: name}
    made = source.config.to_dict() | {"architectures": [name]}
    made.pop("_name_or_path", None)
    return {**made, "auto_map": {key: f"{FILE}.{value}" for key, value in auto.items()}, "zoo_version": zoo.__version__}


def _parts(decoder: DecoderConfig, kind: str) -> set[str]:
    """Names of the parts of one kind that the layers have, also in the arguments of others."""
    known = set(registry.names(kind))
    field = kind.removesuffix("s")
    found = {getattr(layer, field) for layer in decoder.layers}
    nested = {text for layer in decoder.layers for text in _texts((layer.mixer_args, layer.channel_args))}
    return {str(name) for name in found | (nested if kind != "blocks" else set()) if name in known}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for item in value.values() for text in _texts(item))
    elif isinstance(value, (list, tuple)):
        yield from (text for item in value for text in _texts(item))
