"""The checks of a conversion as one HTML page, without scripts and without anything from the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MEANING = {
    "tensors": "Every tensor has the planned shape and value; untouched ones are the source's, bit for bit.",
    "identity": "With no layer swapped, our decoder gives the logits of transformers' own class.",
    "expansion": "Softmax over a new layer's own queries, keys and values is the source's attention.",
    "window": "A windowed layer is the source's attention as long as the text fits into the window.",
    "reload": "A fresh process loads the directory and computes the same logits.",
    "tokenizer": "The tokenizer encodes as the source's does.",
    "kernels": "Every kernel that can run a new layer gives what its reference loop gives.",
    "decode": "Decoding token by token through the cache gives the logits of one forward.",
    "padding": "A row's logits do not depend on the other rows of its batch, nor on padding.",
    "similarity": "Outputs of new layers beside those of the attention that they replace, on the source's inputs.",
    "branches": "KL to the source in nats per token, with one branch of one layer switched off at a time.",
}
TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Verification of {{ name }}</title>
<style>
body { font: 15px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 } td, th { padding: .15rem .7rem; border-bottom: 1px solid #ddd }
th { text-align: left } td { text-align: right } .yes { color: #2f8f5b } .no { color: #b03a5b } h2 { margin-top: 2rem }
</style>
<h1>Verification of {{ name }}</h1>
{% for title, check in checks.items() %}
<h2>{{ title }}: <span class="{{ verdict(check) }}">{{ verdict(check) }}</span></h2>
<p>{{ meaning.get(title, "") }}{% if check.reason %} {{ check.reason }}.{% endif %}</p>
<p>{% for key, value in facts(check).items() %}{{ key }} <b>{{ short(value) }}</b>{{ "" if loop.last else ", " }}
{% endfor %}</p>
{% if check.layers %}
<table><tr><th></th>{% for column in columns(check.layers) %}<th>{{ column }}</th>{% endfor %}</tr>
{% for layer, cells in rows(check.layers) %}
<tr><th>{{ layer }}</th>{% for cell in cells %}<td>{{ short(cell) }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endif %}
{% endfor %}
</html>
"""


def page(name: str, checks: Mapping[str, Mapping[str, Any]]) -> str:
    """The page on the checks of the directory called `name`."""
    from jinja2 import Environment, StrictUndefined

    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    shown = {title: {"reason": "", "layers": {}, **check} for title, check in checks.items()}
    helpers = {"verdict": verdict, "facts": _facts, "columns": _columns, "rows": _rows, "short": _short}
    return template.from_string(TEMPLATE).render(name=name, checks=shown, meaning=MEANING, **helpers)


def verdict(check: Mapping[str, Any]) -> str:
    """Whether a check passed, in words: a check with a reason was not run, one that judges nothing was measured."""
    if check["passed"] is None:
        return "not run" if check.get("reason") else "measured"
    return "yes" if check["passed"] else "no"


def _facts(check: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in check.items() if k not in ("passed", "reason", "layers", "sha256") and v not in ([], {})}


def _columns(layers: Mapping[str, Any]) -> list[str]:
    tables = [cells for cells in layers.values() if isinstance(cells, Mapping)]
    return list(dict.fromkeys(name for cells in tables for name in cells)) or ["error"]


def _rows(layers: Mapping[str, Any]) -> list[tuple[str, list[Any]]]:
    columns = _columns(layers)
    found = {at: cells if isinstance(cells, Mapping) else {"error": cells} for at, cells in layers.items()}
    return [(at, [cells.get(column, "") for column in columns]) for at, cells in found.items()]


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {item}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
