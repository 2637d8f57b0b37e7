"""The dependency rule: each folder imports only what lies below it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

BASE = ("zoo.registry", "zoo.errors")
TORCH = ("torch", "triton")
ALLOWED = {  # what a folder may import of the project
    "kernels": ("zoo.kernels",),
    "architectures": (*BASE, "zoo.kernels", "zoo.architectures"),
    "conversion": (*BASE, "zoo.kernels", "zoo.architectures", "zoo.conversion"),
    "evals": (*BASE, "zoo.kernels", "zoo.architectures", "zoo.evals"),
}
LAZY = {"conversion": ("zoo.loading",), "evals": ("zoo.loading",)}  # inside a function: a model given by its name
NAMELESS = ("zoo.architectures", "zoo.conversion", "zoo.evals", "zoo.kernels")


def imports(source: str) -> list[str]:
    """Dotted names that a module imports, anywhere in it; `from a import b` counts as `a.b`."""
    return names_in(ast.parse(source))


def imports_when_called(source: str) -> list[str]:
    """Of these, the ones inside functions."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [name for node in ast.walk(ast.parse(source)) if isinstance(node, functions) for name in names_in(node)]


def names_in(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" if not node.level else "." for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            argument = node.args[0]
            found += [argument.value] if isinstance(argument, ast.Constant) else []
    return found


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def offences(folder: str, source: str) -> list[str]:
    """Imports in `source`, a module of `folder`, that break the rule."""
    found = imports(source)
    ours = [name for name in found if within(name, ("zoo",)) and not (name == "zoo" and facts_alone(source))]
    bad = [name for name in found if name == "." or within(name, tuple(ALLOWED))]
    if folder == "kernels":
        bad += [n for n in found if not within(n, (*TORCH, "zoo")) and n.split(".")[0] not in sys.stdlib_module_names]
    if folder in ALLOWED:
        lazy = [name for name in imports_when_called(source) if within(name, LAZY.get(folder, ()))]
        return bad + [name for name in ours if not within(name, ALLOWED[folder]) and name not in lazy]
    return bad + [name for name in ours if names_a_model(name)]


def facts_alone(source: str) -> bool:
    """Whether a module that imports `zoo` itself reads no more of it than facts like `__version__`."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    read = [node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "zoo"]
    return all(name.startswith("__") for name in read)


def names_a_model(name: str) -> bool:
    """`zoo` itself reaches registered things by name through the registry; it imports `core` alone."""
    return within(name, NAMELESS) and name.split(".")[2:3] != ["core"]


def modules(root: Path, folder: str) -> list[Path]:
    return [path for path in (root / folder).rglob("*.py") if not any(p.is_symlink() for p in path.parents)]


@pytest.mark.parametrize("folder", [*ALLOWED, "zoo"])
def test_folder_imports_only_what_lies_below(root: Path, folder: str) -> None:
    found = {str(path.relative_to(root)): offences(folder, path.read_text()) for path in modules(root, folder)}
    assert found, f"{folder}/ has no module"
    assert {path: bad for path, bad in found.items() if bad} == {}


def test_nobody_imports_the_command_line(root: Path) -> None:
    importers = {
        str(path.relative_to(root)): name
        for folder in [*ALLOWED, "zoo"]
        for path in modules(root, folder)
        for name in imports(path.read_text())
        if within(name, ("zoo.cli", "zoo.commands"))
    }
    inside = {path for path in importers if path == "zoo/cli.py" or path.startswith("zoo/commands/")}
    assert set(importers) == inside
    assert not any(within(name, ("zoo.cli",)) for name in importers.values())


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("kernels", "import numpy"),
        ("kernels", "from zoo.errors import ZooError"),
        ("architectures", "from zoo.conversion.core import convert"),
        ("architectures", "from zoo import loading"),
        ("conversion", "import zoo.evals.needle"),
        ("evals", "def f():\n    from zoo.conversion.core.convert import convert"),
        ("evals", "from kernels.attention import attention"),
        ("evals", "import importlib\nimportlib.import_module('zoo.conversion.core')"),
        ("evals", "from zoo import loading"),
        ("conversion", "import zoo\nzoo.evaluate()"),
        ("conversion", "from . import plan"),
        ("zoo", "from zoo.architectures.mixers import attention"),
    ],
)
def test_the_rule_can_fail(folder: str, line: str) -> None:
    assert offences(folder, line)


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("kernels", "import math\nimport torch\nfrom triton import language\nfrom zoo.kernels import dispatch"),
        ("architectures", "from zoo.kernels.attention import attention\nfrom zoo import registry"),
        ("evals", "from zoo.architectures.core.modeling import ZooForCausalLM"),
        ("evals", "def f():\n    from zoo import loading\n    import_module('zoo.loading')"),
        ("conversion", "import zoo\nprint(zoo.__version__)"),
        ("zoo", "from zoo.conversion.core.convert import convert"),
    ],
)
def test_the_rule_can_pass(folder: str, line: str) -> None:
    assert offences(folder, line) == []
