"""One Python file out of modules of this package: what a model needs, without its Triton kernels.

Each module becomes a function whose locals are the module's names, so that no name has to change. The functions stand
in the order of their imports, and each is called once.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import zoo

STANDINS = {
    "zoo.registry": "zoo.conversion.core.export.standins.registry",
    "zoo.kernels.launch": "zoo.conversion.core.export.standins.launch",
}
BACKENDS = ("chunked", "eager", "reference")
LOAD = "dispatch.load(__name__)"
HEADER = '''# Copyright the hybrid-zoo authors.
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License: http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing,
# software distributed under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY
# KIND, either express or implied. See the License for the specific language governing permissions and limitations.
"""{title}

Generated from the modules of hybrid-zoo {version}; it needs torch and transformers alone. Each module is a function
whose locals are the module's names. Triton kernels are left out: hybrid-zoo loads the same checkpoint with them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar  # dataclasses look for ClassVar here


def _module(names: dict[str, Any]) -> SimpleNamespace:
    """A module of these names. transformers looks up those in annotations among the file's own."""
    for name, value in names.items():
        globals().setdefault(name, value)
    return SimpleNamespace(**names)
'''


class Module:
    """One module of the package, and the lines that its imports are replaced by."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = _file(STANDINS.get(name, name)).read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)

    @cached_property
    def skipped(self) -> set[ast.AST]:
        """Statements that only a type checker reads."""
        blocks = (node for node in ast.walk(self.tree) if isinstance(node, ast.If) and _checks_types(node.test))
        return {node for block in blocks for node in ast.walk(block)}

    @cached_property
    def imports(self) -> list[ast.ImportFrom]:
        """Imports from this package, wherever they stand."""
        found = (node for node in ast.walk(self.tree) if isinstance(node, ast.ImportFrom) and node not in self.skipped)
        return [node for node in found if (node.module or "").partition(".")[0] == "zoo"]

    def needs(self, *, first: bool) -> list[str]:
        """Names of the modules that it imports: all, or only those that it needs `first`, while it is made."""
        nodes = [node for node in self.imports if not first or node in self.tree.body]
        return [*(owner for node in nodes for owner, _ in map(_place, _full_names(node))), *self.backends]

    @property
    def backends(self) -> list[str]:
        """The modules of an op that run it."""
        wanted = [f"{self.name}.{backend}" for backend in BACKENDS] if LOAD in self.text else []
        return [name for name in wanted if _exists(name)]

    def function(self) -> str:
        """The module as a function, and the call of it."""
        name, lines = flat(self.name), self.text.splitlines()
        kept = _not_indented(self.tree)
        for node in ast.walk(self.tree):
            replaced = self._replacement(node)
            if replaced is not None:
                assert isinstance(node, ast.stmt) and node.end_lineno is not None
                lines[node.lineno - 1 : node.end_lineno] = [
                    *(" " * node.col_offset + line for line in replaced),
                    *[""] * (node.end_lineno - node.lineno + 1 - len(replaced)),
                ]
        body = [line if not line or number in kept else f"    {line}" for number, line in enumerate(lines, 1)]
        text = "\n".join(_few_blanks(body))
        return f"def _{name}() -> Any:\n{text}\n\n    return _module(locals())\n\n\n{name} = _{name}()\n"

    def _replacement(self, node: ast.AST) -> list[str] | None:
        """The lines instead of a statement, at most as many as it has; None: it stays."""
        if isinstance(node, ast.If) and node in self.skipped and _checks_types(node.test):
            return []
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            return []
        if isinstance(node, ast.ImportFrom) and node in self.imports:
            names = ", ".join(alias.asname or alias.name for alias in node.names)
            values = (".".join(filter(None, (flat(owner), rest))) for owner, rest in map(_place, _full_names(node)))
            return [f"{names} = {', '.join(values)}"]
        if isinstance(node, ast.Assign) and ast.unparse(node.value) == LOAD:
            entries = (f'"{name.rpartition(".")[2]}": {_backend(name)}' for name in self.backends)
            return [f"{ast.unparse(node.targets[0])} = {{{', '.join(entries)}}}"]
        if isinstance(node, ast.Expr) and node in self.tree.body and ast.unparse(node) == "register()":
            return []  # the name `zoo` in transformers' Auto classes stays the installed package's
        return None


def bundle(roots: Sequence[str], parts: Mapping[str, Sequence[str]], *, title: str, tail: str) -> str:
    """The text of one file.

    Args:
        roots: modules that the `tail` uses, as in `zoo.architectures.core.modeling`.
        parts: by kind of registry, the names of the parts that the model has.
        title: first line of the file's docstring.
        tail: the file's end, in which a module is `flat` of its name.
    """
    by_kind = {kind: {name: _part(kind, name) for name in names} for kind, names in parts.items()}
    wanted = [*roots, *(module for found in by_kind.values() for module in found.values())]
    modules = _collect([*wanted, "zoo.registry"])
    functions = [modules[name].function() for name in _ordered(modules)]
    table = ", ".join(
        f'"{kind}": {{{", ".join(f"{chr(34)}{name}{chr(34)}: {flat(module)}" for name, module in found.items())}}}'
        for kind, found in by_kind.items()
    )
    filled = f"zoo_registry.MODULES.update({{{table}}})\n{tail}"
    text = "\n\n".join([HEADER.format(title=title, version=zoo.__version__), *functions, filled])
    # torch knows ops by name: two generated files, or one and the package, must not take each other's
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return text.replace('"zoo::', f'"zoo_{digest}::')


def flat(module: str) -> str:
    """The variable that holds a module of this package."""
    return module.replace(".", "_")


def _part(kind: str, name: str) -> str:
    return f"zoo.architectures.{kind}.{name}"


def _collect(names: Sequence[str]) -> dict[str, Module]:
    modules: dict[str, Module] = {}
    left = list(names)
    while left:
        if (name := left.pop()) not in modules:
            modules[name] = Module(name)
            left += modules[name].needs(first=False)
    return modules


def _ordered(modules: Mapping[str, Module]) -> Iterator[str]:
    """Every module after those that it needs while it is made."""
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> Iterator[str]:
        assert name not in above, f"modules import each other: {above}"
        if name not in done:
            for needed in modules[name].needs(first=True):
                yield from visit(needed, (*above, name))
            done.add(name)
            yield name

    for name in sorted(modules):
        yield from visit(name, ())


def _full_names(node: ast.ImportFrom) -> list[str]:
    return [f"{node.module}.{alias.name}" for alias in node.names]


def _place(name: str) -> tuple[str, str]:
    """The module in which a full name lies, and the rest of the name (empty for a module itself)."""
    owner, _, attribute = name.rpartition(".")
    return (name, "") if _exists(name) else (owner, attribute)


def _exists(name: str) -> bool:
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return False
    return found is not None and found.origin is not None


def _file(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, name
    return Path(spec.origin)


def _backend(name: str) -> str:
    module = flat(name)
    supports = f'getattr({module}, "supports", lambda *args: None)'
    return f'dispatch.Backend("{name.rpartition(".")[2]}", {supports}, {module}.run)'


def _checks_types(test: ast.expr) -> bool:
    return ast.unparse(test) == "TYPE_CHECKING"


def _not_indented(tree: ast.Module) -> set[int]:
    """Numbers of lines that continue a text: all but docstrings, to which spaces do nothing."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, holders) and _starts_with_text(n)}  # type: ignore[attr-defined]
    texts = (n for n in ast.walk(tree) if isinstance(n, (ast.Constant, ast.JoinedStr)) and id(n) not in docstrings)
    return {line for n in texts for line in range(n.lineno + 1, (n.end_lineno or n.lineno) + 1) if _is_text(n)}


def _starts_with_text(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> bool:
    return bool(node.body) and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)


def _is_text(node: ast.Constant | ast.JoinedStr) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(node.value, str)


def _few_blanks(lines: Sequence[str]) -> Iterator[str]:
    """Without the blank lines that removed statements leave."""
    blanks = 0
    for line in lines:
        blanks = blanks + 1 if not line else 0
        if blanks <= 2:
            yield line
