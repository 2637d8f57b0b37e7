"""The decoder as a transformers model: causal and masked language models, Auto-class registration.

B batch, T new tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GenerationMixin,
    PreTrainedModel,
    initialization,
)
from transformers.cache_utils import Cache
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_recurrent_attention_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MaskedLMOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from zoo.architectures.core import adopt
from zoo.architectures.core.block import Block
from zoo.architectures.core.decoder import Batch, Decoder, encoder_only, prepare_cache
from zoo.architectures.core.mixer import Part, Phase
from zoo.architectures.core.norms import OnePlusRMSNorm
from zoo.architectures.core.rectify import rectify_decoded
from zoo.architectures.core.recurrent import ConvStates
from zoo.architectures.core.rope import RotaryTable, turns_change
from zoo.architectures.core.zoo_config import ZooConfig


class ZooPreTrainedModel(PreTrainedModel):
    config_class = ZooConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": Block}
    _is_stateful = False  # the cache can go back: assisted decoding works

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, OnePlusRMSNorm):
            initialization.zeros_(module.weight)
        elif isinstance(module, (RotaryTable, ConvStates)):
            module.reset()
        elif isinstance(module, Part):
            module.init_weights(self.config.initializer_range)
        else:
            super()._init_weights(module)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # every part initialises by transformers' functions; as custom code one without parameters of its own is skipped
        super()._initialize_weights(module)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """As in transformers, but parts that layers share are one whether or not the head is tied to the embedding."""
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)
        return dict(self._tied_weights_keys or {})

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """As in transformers, with the non-reentrant form by default (values pass between layers)."""
        kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        super().gradient_checkpointing_enable(kwargs, **options)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """Mixers make their masks from the plain `[batch, tokens]` mask."""
        return attention_mask

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if isinstance(cache := model_kwargs.get("past_key_values"), Cache):
            prepare_cache(cache, True, self.config.num_hidden_layers)


class ZooModel(ZooPreTrainedModel, Decoder):
    """The decoder without a head."""

    def __init__(self, config: ZooConfig) -> None:
        super().__init__(config)
        self.build(config.decoder_config, causal=not getattr(config, "bidirectional", False))
        self.gradient_checkpointing = False
        self._no_split_modules = sorted({type(block).__name__ for block in self.layers})
        self._keep_in_fp32_modules_strict = _fp32_names(self)
        self._tied_weights_keys = _shared_weights(self)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        phase: Phase | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """`input_ids [B, T]` (or `inputs_embeds [B, T, D]`) to hidden states `[B, T, D]`.

        Packed rows (B = 1) give `cu_seqlens`, or transformers' `cu_seq_lens_q`, or positions that start again at 0.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if self.gradient_checkpointing and self.training:
            use_cache = False
        cache = prepare_cache(past_key_values, bool(use_cache), self.config.num_hidden_layers)
        batch = Batch(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seqlens=kwargs.get("cu_seq_lens_q") if cu_seqlens is None else cu_seqlens,
            max_seqlen=kwargs.get("max_length_q") if max_seqlen is None else max_seqlen,
            phase=phase,
        )
        eager = self.config._attn_implementation == "eager"
        x = self.run(input_ids, inputs_embeds, cache, batch, eager)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=cache)


class _Head(ZooPreTrainedModel):
    """A model with a vocabulary head over the decoder."""

    def __init__(self, config: ZooConfig) -> None:
        super().__init__(config)
        self.model = ZooModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
        self._tied_weights_keys = tied
        self._keep_in_fp32_modules_strict = _fp32_names(self)
        self.vocab_size = config.vocab_size
        self.post_init()

    def logits(self, hidden: Tensor) -> Tensor:
        """`[B, T, D] -> [B, T, V]`, scaled and soft-capped as the config says."""
        head = self.model.decoder_config.head
        logits = self.lm_head(hidden)
        if head.scale != 1.0:
            logits = logits * head.scale
        return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)

    def state_bytes(self, length: int, itemsize: int | None = None) -> int:
        """Bytes of cache for one sequence of `length` tokens; `itemsize` defaults to that of the weights."""
        return self.model.state_bytes(length, itemsize or self.dtype.itemsize)


class ZooForCausalLM(_Head, GenerationMixin):
    """Any architecture of the zoo as a causal language model."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """`input_ids [B, T]` to logits `[B, T, V]` (of the last `logits_to_keep` tokens; 0 keeps all)."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers, after rectifying what the cache holds of decoded tokens, where a layer wants that.

        Where a text outgrows the short frequencies of a `longrope`, the cache is filled anew with the long ones.
        """
        if past_key_values is not None and next_sequence_length is not None:
            first, call = kwargs.get("is_first_iteration", False), (input_ids, next_sequence_length, attention_mask)
            rectify_decoded(self, past_key_values, *call, continued=bool(first))
            if turns_change(self.model.ropes.values(), past_key_values, *call):
                past_key_values.reset()
                next_sequence_length = None  # the whole text again
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, past_key_values, attention_mask, **kwargs
        )


class ZooForMaskedLM(_Head):
    """A bidirectional stack as a masked language model."""

    def __init__(self, config: ZooConfig) -> None:
        config.bidirectional = True
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """`input_ids [B, T]` to logits `[B, T, V]`; the loss is over labels other than -100."""
        kwargs["use_cache"] = False
        out = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.logits(out.last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)


def model_class(config: ZooConfig) -> type[ZooForCausalLM] | type[ZooForMaskedLM]:
    """The class of the models of `config`: masked if it says so or if a mixer of it sees tokens to come."""
    masked = getattr(config, "bidirectional", False) or encoder_only(config.decoder_config)
    return ZooForMaskedLM if masked else ZooForCausalLM


def _fp32_names(model: nn.Module) -> set[str]:
    """Last names of the parameters and buffers that mixers and channels keep in fp32."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    return {name.rpartition(".")[2] for name, tensor in tensors if getattr(tensor, "_zoo_fp32", False)}


def _shared_weights(model: ZooModel) -> dict[str, str]:
    """Every parameter of a shared submodule's copies, mapped to the first."""
    return {
        f"{copy}.{name}": f"{first}.{name}"
        for copy, first in model.shared.items()
        for name, _ in model.get_submodule(first).named_parameters()
    }


def register() -> None:
    """Register the config, the models and the cache layer with transformers' Auto classes."""
    adopt.register()
    LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING["zoo_recurrent"] = create_recurrent_attention_mask
    AutoConfig.register("zoo", ZooConfig, exist_ok=True)
    AutoModel.register(ZooConfig, ZooModel, exist_ok=True)
    AutoModelForCausalLM.register(ZooConfig, ZooForCausalLM, exist_ok=True)
    AutoModelForMaskedLM.register(ZooConfig, ZooForMaskedLM, exist_ok=True)


register()
