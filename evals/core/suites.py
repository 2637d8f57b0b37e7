"""Sets of tasks under one name, with the options that make them fit it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo import registry
from zoo.errors import ZooError

Options = Mapping[str, Any]
RECALL: Mapping[str, Options] = {
    "needle": {},
    "key_value": {},
    "passkey": {},
    "json_kv": {},
    "phonebook": {},
    "variable_tracking": {},
    "symbolic": {},
}
LONG: Mapping[str, Options] = {"extrapolation": {}, "perplexity": {}, "needle": {}, "passkey": {}}
LANGUAGE: Mapping[str, Options] = {
    name: {} for name in ("lambada", "piqa", "winogrande", "arc_easy", "boolq", "openbook_qa", "copa", "gsm8k")
}
EFFICIENCY: Mapping[str, Options] = {"efficiency": {}, "effective_state_size": {}, "state_utilisation": {}}
SUITES: Mapping[str, Mapping[str, Options]] = {
    "quick": {
        "perplexity": {"length": 512, "windows": 16},
        "needle": {"lengths": (256, 512), "samples": 10},
        "key_value": {"pairs": (16,), "samples": 10},
        "fidelity": {"length": 512, "windows": 8},
        "efficiency": {},
    },
    "recall": RECALL,
    "long": LONG,
    "language": LANGUAGE,
    "efficiency": EFFICIENCY,
    "full": {**RECALL, **LONG, **LANGUAGE, "fidelity": {}, **EFFICIENCY, "attention_sinks": {}},
}


def suite(name: str) -> Mapping[str, Options]:
    """Tasks of a suite and their options.

    Raises:
        ZooError: an unknown name.
    """
    if name not in SUITES:
        raise ZooError(f"suite {name!r} is unknown; choose one of: {', '.join(SUITES)}")
    return SUITES[name]


def split(tasks: Mapping[str, Options], given: set[str]) -> tuple[dict[str, Options], dict[str, str]]:
    """The tasks that can run with what is `given`, and what each of the others lacks."""
    lacks = {task: sorted(set(registry.get("evals", task, "NEEDS")) - given - {"tokenizer"}) for task in tasks}
    ready = {task: options for task, options in tasks.items() if not lacks[task]}
    return ready, {task: ", ".join(names) for task, names in lacks.items() if names}
