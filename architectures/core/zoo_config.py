"""The JSON form of an architecture: a transformers config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from zoo import registry
from zoo.architectures.core.config import DecoderConfig
from zoo.errors import ZooError

FORMAT_VERSION = 1


@strict
class ZooConfig(PreTrainedConfig):
    """JSON form of a `DecoderConfig`, plus what transformers wants to know.

    `layers` says everything about the mixers; `layer_types` repeats it in transformers' words.
    """

    model_type = "zoo"
    keys_to_ignore_at_inference = ["past_key_values"]

    architecture: str = "transformer"
    format_version: int = FORMAT_VERSION
    vocab_size: int = 256
    hidden_size: int = 64
    num_hidden_layers: int = 0
    layers: list | None = None
    embed: dict | None = None
    head: dict | None = None
    norm: dict | None = None
    ropes: dict | None = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    layer_types: list[str] | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    sliding_window: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.format_version > FORMAT_VERSION:
            raise ZooError(
                f"this checkpoint has config format {self.format_version}, this library reads up to {FORMAT_VERSION}; "
                "upgrade hybrid-zoo"
            )
        self.layers = self.layers or []
        self.num_hidden_layers = len(self.layers)
        self.layer_types = [_layer_type(layer) for layer in self.layers]
        self.tie_word_embeddings = bool((self.head or {}).get("tied", False))
        self._derive_attention()
        super().__post_init__(**kwargs)

    def _derive_attention(self) -> None:
        """Facts about the first softmax layer, for tools that read them off a config."""
        for layer in self.layers or ():
            args = layer.get("mixer_args", {})
            if layer.get("mixer") == "attention":
                self.num_attention_heads, self.head_dim = args["heads"], args["head_dim"]
                self.num_key_value_heads = args.get("kv_heads") or args["heads"]
                self.sliding_window = self.sliding_window or args.get("window")

    def validate_layer_type(self) -> None:
        """Our own word `zoo_recurrent` stands beside transformers' list."""

    @property
    def decoder_config(self) -> DecoderConfig:
        """The typed form; building it validates the layers."""
        values = {name: getattr(self, name) for name in ("vocab_size", "hidden_size", "max_position_embeddings")}
        parts = {name: getattr(self, name) or {} for name in ("embed", "head", "norm", "ropes")}
        return DecoderConfig.from_dict({**values, **parts, "layers": self.layers or []})

    @classmethod
    def from_decoder(cls, decoder: DecoderConfig, architecture: str, **fields: Any) -> ZooConfig:
        """The config of `decoder`; `fields` are transformers' own (token ids, initializer_range, dtype, ...)."""
        return cls(architecture=architecture, **decoder.to_dict(), **fields)


def _layer_type(layer: Mapping[str, Any]) -> str:
    if layer.get("mixer") is None:
        return "zoo_recurrent"
    mixer = registry.get("mixers", layer["mixer"], "MODULE")
    return mixer.layer_type_of(layer.get("mixer_args", {}))
