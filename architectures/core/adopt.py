"""How transformers' caches come to hold our layers."""

from __future__ import annotations

from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, Cache, DynamicCache

from zoo.architectures.core.cache import LayerCache


def adopt(cache: Cache | None, layers: int) -> Cache:
    """`cache` with our layers in it: a new one for None, replacing transformers' own layers while they are empty.

    Raises:
        ValueError: the cache already holds another model's keys and values.
    """
    cache = DynamicCache() if cache is None else cache
    if len(cache.layers) == layers and all(isinstance(layer, LayerCache) for layer in cache.layers):
        return cache
    if any(layer.is_initialized for layer in cache.layers if not isinstance(layer, LayerCache)):
        raise ValueError("past_key_values was filled by another model; pass an empty cache or None")
    old = list(cache.layers) or [None] * layers
    static = type(cache).__name__ == "StaticCache"
    limits = [layer.max_cache_len if static and layer is not None else None for layer in old]
    cache.layers = [LayerCache(max_cache_len=limit) for limit in limits[:layers]]
    cache.layer_class_to_replicate = None
    return cache


def register() -> None:
    """Make our layer known to transformers under the one word `zoo_recurrent`."""
    DYNAMIC_LAYER_TYPE_MAPPING["zoo_recurrent"] = LayerCache
    STATIC_LAYER_TYPE_MAPPING["zoo_recurrent"] = LayerCache
