"""Training-free methods inside transformers' own models, through its attention interface.

A layer whose attention is more than causal softmax (a window, chunks, a softcap, sinks, a bias, dropout, a mask of
another kind) attends as it did before.

B batch, T new tokens, S keys, H query heads, G KV heads, K and V head widths.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from zoo.architectures.core.methods import Choice, Rule
from zoo.architectures.core.noted import layer_of, notes_of, offset_of, remember_cache
from zoo.architectures.core.places import Places, places_of
from zoo.architectures.core.sparse import View
from zoo.errors import ZooError

RuleOf = Callable[[int, Mapping[str, Any]], Rule | None]
BASES = ("sdpa", "eager")
MORE_THAN_SOFTMAX = ("sliding_window", "softcap", "s_aux", "position_bias")
Result = tuple[Tensor, Tensor | None]


class Attend:
    """An attention function of transformers that attends by the rule of each layer, and by `base` where it has none."""

    def __init__(self, rule_of: RuleOf, base: str) -> None:
        self.rule_of, self.base = rule_of, base
        self.rules: dict[tuple[int, ...], Rule | None] = {}

    @torch.compiler.disable
    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Result:
        """`query [B, H, T, K]`, `key [B, G, S, K]`, `value [B, G, S, V]` to `[B, T, H, V]`."""
        rule = None if more_than_softmax(module, kwargs) else self._rule(module, query, key, value)
        view = None if rule is None else view_of(module, query, key, value, attention_mask, kwargs.get("scaling"))
        if rule is None or view is None:
            return self._base(module)(module, query, key, value, attention_mask, **kwargs)
        return rule(view).contiguous(), None

    def _rule(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Rule | None:
        layer: int = module.layer_idx  # type: ignore[assignment]
        shape = (layer, query.shape[1], key.shape[1], query.shape[3], value.shape[3])
        if shape not in self.rules:
            self.rules[shape] = self.rule_of(layer, sizes(*shape[1:]))
        return self.rules[shape]

    def _base(self, module: nn.Module) -> Callable[..., Result]:
        made_in = sys.modules[type(module).__module__]
        found: Any = made_in.eager_attention_forward if self.base == "eager" else ALL_ATTENTION_FUNCTIONS[self.base]
        return cast("Callable[..., Result]", found)


def sizes(heads: int, kv_heads: int, head_dim: int, value_dim: int | None = None) -> dict[str, Any]:
    """The options of a mixer that say how large attention is."""
    same = value_dim in (None, head_dim)
    return dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=None if same else value_dim)


def more_than_softmax(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether the attention of a module in this call is not that of causal softmax alone."""
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    layer = getattr(module, "layer_idx", None)
    if not causal or layer is None or kwargs.get("dropout") or kwargs.get("output_attentions"):
        return True
    if any(kwargs.get(name) is not None for name in MORE_THAN_SOFTMAX):
        return True
    types = getattr(getattr(module, "config", None), "layer_types", None) or ()
    return layer < len(types) and any(word in types[layer] for word in ("sliding", "chunk"))


def view_of(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None) -> View | None:
    """The call as a method sees it; None where its mask is not that of causal attention with padding."""
    layer, tokens, keys = layer_of(module, k), q.shape[2], k.shape[2]
    offset = offset_of(layer, tokens, keys)
    places = None
    if isinstance(mask, Tensor):
        places = places_of(mask, q.shape[0], offset)
    elif isinstance(offset, Tensor):  # a static cache that only this call has written
        at = torch.arange(tokens, device=q.device) + offset
        places = Places(at.expand(q.shape[0], -1), at.new_zeros(q.shape[0]))
    if mask is not None and places is None or mask is None and places is None and tokens not in (1, keys):
        return None
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    call: dict[str, Any] = dict(decoding=tokens == 1 and keys > 1, scale=scale)
    if places is not None and places.order is not None:  # noted keys would move when others come
        order = places.order[..., None, None]
        k, v = k.gather(1, order.expand_as(k)), v.gather(1, order.expand_as(v))
        return View(q.transpose(1, 2), k, v, q_positions=places.q_positions, **call)
    call["notes"] = None if layer is None else notes_of(layer, tokens)
    if places is not None:
        call |= dict(q_positions=places.q_positions, starts=places.starts)
    return View(q.transpose(1, 2), k, v, **call)


def attach(model: nn.Module, choice: Choice) -> None:
    """Make a transformers model attend by `choice` from now on.

    Raises:
        ZooError: the choice does not fit the model, or its attention cannot be replaced.
    """
    check(model.config, type(model), choice)
    attach_rules(model, choice.rule, choice.key(), choice.mixer)


def attach_rules(model: Any, rule_of: RuleOf, key: str, label: str) -> None:
    """Register what `rule_of` makes of each layer, under a name for this `key`, and let the model attend by it."""
    base = getattr(model, "_zoo_base_attention", None) or model.config._attn_implementation
    if base not in BASES:
        raise ZooError(f"attn_implementation was {base!r}; beside attention= it must be {' or '.join(BASES)}")
    name = f"zoo:{label}:{hashlib.sha256(f'{base}{key}'.encode()).hexdigest()[:12]}".replace("flash", "fl")
    AttentionInterface.register(name, Attend(rule_of, base))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    for module in model.modules():
        hooks = module._forward_pre_hooks.values()
        if isinstance(getattr(module, "layer_idx", None), int) and remember_cache not in hooks:
            module.register_forward_pre_hook(remember_cache, with_kwargs=True)
    model.set_attn_implementation(name)
    model._zoo_base_attention = base


def detach(model: Any) -> None:
    """Let a model attend as it did before `attach`."""
    if base := getattr(model, "_zoo_base_attention", None):
        model.set_attn_implementation(base)


def check(config: Any, cls: type, choice: Choice) -> None:
    """Raise `ZooError` if models of `cls` do not let their attention be replaced, or the choice does not fit."""
    if not cls._can_set_attn_implementation():  # type: ignore[attr-defined]
        raise ZooError(f"{cls.__name__} does not let its attention be replaced; zoo.save it in our format first")
    text = config.get_text_config(decoder=True)
    heads, width = text.num_attention_heads, text.hidden_size
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or (width // heads if isinstance(heads, int) else None)
    made = [heads, kv_heads, head_dim]
    choice.check(text.num_hidden_layers, sizes(*made) if all(isinstance(size, int) for size in made) else None)
