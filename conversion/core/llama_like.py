"""Published formats that are Llama's with options: what they share, with one place for each thing that differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope
from zoo.architectures.core.local_global import BIASES, FULL, LOCAL, arguments, layer_types, softmax_fields, whole_rope
from zoo.architectures.core.published import confirm, head_rule, linear_rules, require, rope_parameters
from zoo.architectures.core.rules import Rule, drop, rename
from zoo.errors import ZooError

Config = Mapping[str, Any]
LAYER, MIXER, CHANNEL = "model.layers.{i}.", "model.layers.{i}.mixer.", "model.layers.{i}.channel."
EMBEDDING = (
    rename("model.embed_tokens.weight", "model.embed_tokens.weight"),
    rename("model.norm.weight", "model.norm.weight"),
)
NORMS = (
    rename(LAYER + "input_layernorm.weight", LAYER + "mixer_norm.weight"),
    rename(LAYER + "post_attention_layernorm.weight", LAYER + "channel_norm.weight"),
)
ATTENTION = (
    *linear_rules(LAYER + "self_attn.", MIXER, ("q_proj", "k_proj", "v_proj", "o_proj")),
    drop(LAYER + "self_attn.rotary_emb.inv_freq"),
)
QK_NORMS = tuple(rename(f"{LAYER}self_attn.{n}.weight", f"{MIXER}{n}.weight") for n in ("q_norm", "k_norm"))
MLP = linear_rules(LAYER + "mlp.", CHANNEL, ("gate_proj", "up_proj", "down_proj"))
RULES: tuple[Rule, ...] = (*EMBEDDING, *NORMS, *ATTENTION, *MLP)
# what transformers takes for a field that a config leaves out; a format overrides what it has otherwise
DEFAULTS: dict[str, Any] = dict(
    hidden_act="silu",
    num_key_value_heads=None,
    head_dim=None,
    rms_norm_eps=1e-6,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
)
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "tie_word_embeddings",
)


def _alike(config: Config, layer: Layer) -> Sequence[Layer]:
    return [layer] * config["num_hidden_layers"]


@dataclass(frozen=True, kw_only=True)
class LlamaLike:
    """One format. Its functions take a `config.json` with the `defaults` filled in.

    Args:
        model_type, causal_lm: transformers' names of the format and of its model.
        defaults: what transformers takes for a field that a config leaves out, where it is not that of `DEFAULTS`.
        layers: `(config, Llama's layer without biases) -> layers`; without it they are all alike.
        finish: `(config, decoder) -> decoder`, for what lies outside the layers.
        table: `(config, head_dim) -> Rope`, the one rotary table.
        fields: `decoder -> fields` of a published config beside those that all formats have.
        key_rules: `config -> rules` of all tensors but the head.
    """

    model_type: str
    causal_lm: str
    defaults: Config = field(default_factory=dict)
    layers: Callable[[Config, Layer], Sequence[Layer]] = _alike
    finish: Callable[[Config, DecoderConfig], DecoderConfig] = lambda config, decoder: decoder
    table: Callable[[Config, int], Rope] = whole_rope
    fields: Callable[[DecoderConfig], Config] = lambda decoder: {}
    key_rules: Callable[[Config], Sequence[Rule]] = lambda config: RULES

    def _filled(self, config: Config) -> dict[str, Any]:
        return {**DEFAULTS, **self.defaults, **config}

    def matches(self, config: Config) -> bool:
        """Whether this module owns the format of a `config.json`."""
        return config.get("model_type") == self.model_type

    def rules(self, config: Config) -> Sequence[Rule]:
        """The key rules; a tied checkpoint may hold its embedding a second time, as the head."""
        filled = self._filled(config)
        return *self.key_rules(filled), head_rule(bool(filled["tie_word_embeddings"]))

    def decoder(self, config: Config) -> DecoderConfig:
        """Our decoder for a `config.json`.

        Raises:
            ZooError: a value whose computation we do not have, by name.
        """
        config = self._filled(config)
        require(config, "hidden_act", ("silu", "swish"), "silu")
        heads = config["num_attention_heads"]
        head_dim = config["head_dim"] or config["hidden_size"] // heads
        sizes = dict(heads=heads, kv_heads=config["num_key_value_heads"] or heads, head_dim=head_dim, rope="default")
        channel = {"intermediate_size": config["intermediate_size"]}
        layer = Layer(mixer="attention", mixer_args=sizes, channel="swiglu", channel_args=channel)
        made = DecoderConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            layers=tuple(self.layers(config, layer)),
            head=Head(tied=bool(config["tie_word_embeddings"])),
            norm=Norm(eps=config["rms_norm_eps"]),
            ropes={"default": self.table(config, head_dim)},
            max_position_embeddings=config["max_position_embeddings"],
        )
        return self.finish(config, made)

    def published(self, decoder: DecoderConfig, config: Config) -> dict[str, Any]:
        """The `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

        Raises:
            ZooError: a decoder that the format cannot express.
        """
        try:
            sizes = softmax_fields(decoder)
        except ZooError as error:
            raise ZooError(f"{error}; save this hybrid as zoo") from None
        if "default" not in decoder.ropes:
            raise ZooError(f"{self.model_type} needs a rotary table named default; save as zoo")
        result = {
            **config,
            "model_type": self.model_type,
            "architectures": [self.causal_lm],
            **{name: sizes[name] for name in SIZES},
            "hidden_act": "silu",
            "rms_norm_eps": decoder.norm.eps,
            "rope_parameters": rope_parameters(decoder.ropes["default"]),
            **self.fields(decoder),
        }
        return confirm(result, decoder, self.decoder)


def with_mixer(layer: Layer, **args: Any) -> Layer:
    """`layer` with more arguments of its mixer."""
    return replace(layer, mixer_args={**layer.mixer_args, **args})


def with_biases(config: Config, layer: Layer) -> Layer:
    """`layer` with the biases that `attention_bias` and `mlp_bias` ask for."""
    channel = {**layer.channel_args, "bias": bool(config["mlp_bias"])}
    biases = dict.fromkeys(BIASES, bool(config["attention_bias"]))
    return replace(with_mixer(layer, **biases), channel_args=channel)


def with_windows(layer: Layer, windows: Sequence[int | None]) -> list[Layer]:
    """`layer` once per entry of `windows`, None for full attention."""
    return [layer if window is None else with_mixer(layer, window=window) for window in windows]


def one_window(config: Config) -> list[int | None]:
    """The same `sliding_window` (None: full attention) in every layer.

    Raises:
        ZooError: a `layer_types` that says otherwise; transformers does not read it in these formats.
    """
    depth, window = config["num_hidden_layers"], config.get("sliding_window")
    if set(kinds := config.get("layer_types") or ()) - {FULL if window is None else LOCAL}:
        raise ZooError(
            f"layer_types {list(kinds)} of a {config['model_type']} checkpoint is not supported: its sliding_window "
            f"({window}) is that of every layer; a model with several kinds of layers is of another model_type"
        )
    return [window] * depth


def windows_by_type(config: Config, kinds: Sequence[str]) -> list[int | None]:
    """`sliding_window` in the layers that `layer_types`, or else `kinds`, calls sliding_attention."""
    window = config["sliding_window"] if config.get("use_sliding_window", True) else None
    named = {**config, "layer_types": config.get("layer_types") or list(kinds), "sliding_window": window}
    return [window if kind == LOCAL else None for kind in layer_types(named, period=1)]


def qwen_windows(config: Config) -> list[int | None]:
    """With `use_sliding_window`, a window from layer `max_window_layers` on."""
    used = config["use_sliding_window"] and config["sliding_window"] is not None
    first = config["max_window_layers"] if used else config["num_hidden_layers"]
    return windows_by_type(config, [LOCAL if i >= first else FULL for i in range(config["num_hidden_layers"])])


def window_field(decoder: DecoderConfig) -> dict[str, Any]:
    """The `sliding_window` of `decoder`, None where it has none."""
    return {"sliding_window": softmax_fields(decoder).get("sliding_window")}


def window_fields(decoder: DecoderConfig) -> dict[str, Any]:
    """`window_field`, `use_sliding_window`, and the kind of each layer."""
    window = window_field(decoder)
    used = window["sliding_window"] is not None
    return {**window, "use_sliding_window": used, "layer_types": softmax_fields(decoder)["layer_types"]}


def bias_fields(decoder: DecoderConfig) -> dict[str, Any]:
    """`attention_bias` and `mlp_bias`."""
    layer = decoder.layers[0]
    return {"attention_bias": arguments(decoder)[0].q_bias, "mlp_bias": bool(layer.channel_args.get("bias", False))}
