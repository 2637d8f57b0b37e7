"""Layouts as text: `gated_delta_net*3,attention`, arguments in brackets, groups, tiled over the layers."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from zoo import registry
from zoo.errors import ZooError

Item = tuple[str, dict[str, Any]]
WORDS = {"true": True, "false": False, "none": None}


def parse_layout(text: str, depth: int) -> list[Item]:
    """One `(mixer, arguments)` per layer.

    `name(key=value,...)` gives arguments, `*n` repeats an item or a bracketed group, and a layout shorter than `depth`
    starts again from its beginning: `(gated_delta_net*3,attention(window=64,sinks=1))*2`.

    Raises:
        ZooError: text that is not a layout, an unknown mixer, or more items than layers.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise _invalid(text, text) from None
    items = _items(tree, text)
    for name, _ in items:
        if name not in registry.names("mixers"):
            raise registry.unknown("mixers", name)
    if not items or len(items) > depth:
        raise ZooError(f"layout {text!r} has {len(items)} layers; the model has {depth}: give at most as many")
    return [(name, dict(args)) for name, args in (items[i % len(items)] for i in range(depth))]


def _items(node: ast.expr, text: str) -> list[Item]:
    if isinstance(node, ast.Tuple):
        return [item for element in node.elts for item in _items(element, text)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return _items(node.left, text) * _count(node.right, text)
    if isinstance(node, ast.Name):
        return [(node.id, {})]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        return [(node.func.id, {str(k.arg): _value(k.value, text) for k in node.keywords})]
    raise _invalid(text, ast.unparse(node))


def _count(node: ast.expr, text: str) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int and 0 < node.value <= 10_000:
        return node.value
    raise _invalid(text, ast.unparse(node))


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name):
        return WORDS.get(node.id.lower(), node.id)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise _invalid(text, ast.unparse(node)) from None


def _invalid(text: str, part: str) -> ZooError:
    return ZooError(f"layout {text!r} is invalid at {part!r}; write it as mixer*3,attention or mixer(key=value)")


def overridden(args: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`args` with what the user has `given`, also inside arguments that are mappings."""
    merged = dict(args)
    for name, value in given.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = overridden(merged[name], value) if nested else value
    return merged
