"""Reversible rules over tensor names: how a published checkpoint becomes ours, and ours becomes it again.

A pattern names tensors with `{i}` for a number (`model.layers.{i}.mlp.up_proj.weight`) and `{any}` for any text. A rule
says which operations lead from its sources to each target, and which lead back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from zoo.architectures.core.operations import Operation
from zoo.errors import ZooError

Chain = tuple[Operation, ...]
COPY: Chain = (Operation("copy"),)
_DROP_AXIS: Chain = (Operation("transpose", {"dims": (1, 0, 2)}), Operation("take", {"index": 0}))
_ADD_AXIS: Chain = (Operation("stack"), Operation("transpose", {"dims": (1, 0, 2)}))


class TensorSpec(Protocol):
    """What a rule must know about a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Step:
    """How one tensor is made: `sources` through `operations` to `target`, of `shape` and `dtype`."""

    target: str
    sources: tuple[str, ...]
    operations: Chain
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def copied(self) -> bool:
        """Whether the tensor is one source, unchanged."""
        return len(self.sources) == 1 and all(operation.name == "copy" for operation in self.operations)

    def run(self, get: Callable[[str], Tensor]) -> Tensor:
        """The tensor, from sources read by `get`."""
        return run_chain(self.operations, [get(name) for name in self.sources])

    def then(self, target: str, operation: Operation) -> Step:
        """This step, followed by one more operation, under another name."""
        before = () if self.copied else self.operations
        chain = self.operations if operation.name == "copy" else (*before, operation)
        made = operation([torch.empty(self.shape, dtype=self.dtype, device="meta")])
        return Step(target, self.sources, chain, tuple(made.shape), made.dtype)


def run_chain(operations: Chain, tensors: Sequence[Tensor]) -> Tensor:
    """The first operation takes all tensors, each later one the result before it."""
    result = operations[0](tensors)
    for operation in operations[1:]:
        result = operation([result])
    return result


@dataclass(frozen=True)
class Rule:
    """`forward` has one chain per target over all sources, `backward` one chain per source over all targets.

    A rule without targets drops its source; with `same_as`, only where it equals that tensor. One with `read_only` has
    no way back: another rule writes the targets, under the names of today. With `layers` it holds only where `{i}` is
    one of them: layers of different kinds may use one name for different things.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    forward: tuple[Chain, ...]
    backward: tuple[Chain, ...]
    same_as: str | None = None
    read_only: bool = False
    layers: frozenset[int] | None = None

    def inverse(self) -> Rule:
        """The rule from targets to sources."""
        return Rule(self.targets, self.sources, self.backward, self.forward, layers=self.layers)

    def match(self, name: str) -> dict[str, str] | None:
        """The numbers for which `name` is the first source, or None."""
        found = self._pattern.fullmatch(name)
        if found is None or (self.layers is not None and int(found["i"]) not in self.layers):
            return None
        return found.groupdict()

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        pieces = re.split(r"\{(\w+)\}", self.sources[0])
        return re.compile("".join(re.escape(p) if n % 2 == 0 else _group(p) for n, p in enumerate(pieces)))


def _group(name: str) -> str:
    text = ".+" if name == "any" else r"\d+"
    return f"(?P<{name}>{text})"


def rename(source: str, target: str) -> Rule:
    """The same tensor under another name."""
    return Rule((source,), (target,), (COPY,), (COPY,))


def alias(rule: Rule) -> Rule:
    """`rule` for names that are read but never written: those of older checkpoints."""
    return replace(rule, read_only=True)


def within(layers: Iterable[int], rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The `rules`, for these layers (the numbers `{i}`) alone."""
    chosen = frozenset(layers)
    return tuple(replace(rule, layers=chosen) for rule in rules)


def split(source: str, targets: Sequence[str], sizes: Sequence[int] | None = None, dim: int = 0) -> Rule:
    """One tensor cut along `dim` into `targets`, of `sizes` rows each (None: equal parts)."""
    parts = _equal(len(targets), dim) if sizes is None else _slices(sizes, dim)
    return Rule((source,), tuple(targets), tuple(parts), ((Operation("concat", {"dim": dim}),),))


def unweave(source: str, targets: Sequence[str], sizes: Sequence[int], groups: int) -> Rule:
    """One tensor of `groups` equal parts, each with `sizes` rows of the `targets` one after the other."""
    stops = list(accumulate(sizes))
    forward = [
        (Operation("band", {"groups": groups, "start": start, "stop": stop}),)
        for start, stop in zip([0, *stops], stops, strict=False)
    ]
    return Rule((source,), tuple(targets), tuple(forward), ((Operation("weave", {"groups": groups}),),))


def concat(sources: Sequence[str], target: str, sizes: Sequence[int] | None = None, dim: int = 0) -> Rule:
    """Several tensors, of `sizes` rows (None: equal), one after the other along `dim`."""
    return split(target, sources, sizes, dim).inverse()


def transpose(source: str, target: str, dims: Sequence[int] = (1, 0)) -> Rule:
    """Axes reordered to `dims`."""
    back = sorted(range(len(dims)), key=lambda axis: dims[axis])
    forward, backward = (Operation("transpose", {"dims": tuple(d)}) for d in (dims, back))
    return Rule((source,), (target,), ((forward,),), ((backward,),))


def interleave(source: str, target: str, head_dim: int, to: str = "half", dim: int = 0) -> Rule:
    """Rows (along `dim`) of each head reordered from the other rotary pairing `to` this (`half` or `interleaved`)."""
    back = "interleaved" if to == "half" else "half"
    options = {"head_dim": head_dim, "dim": dim}
    forward, backward = (Operation("pair", {**options, "to": order}) for order in (to, back))
    return Rule((source,), (target,), ((forward,),), ((backward,),))


def add(source: str, target: str, value: float) -> Rule:
    """Plus a constant (exact in both directions up to the rounding of the stored dtype)."""
    forward, backward = (Operation("add", {"value": constant}) for constant in (value, -value))
    return Rule((source,), (target,), ((forward,),), ((backward,),))


def through(source: str, target: str, forward: Sequence[Operation], backward: Sequence[Operation]) -> Rule:
    """One tensor through the operations `forward`, and back through `backward`."""
    return Rule((source,), (target,), (tuple(forward),), (tuple(backward),))


def reshape(source: str, target: str, to: Sequence[int], back: Sequence[int]) -> Rule:
    """The same numbers in the shape `to`, and in `back` again; -1 stands for what is left."""
    forward, backward = (Operation("reshape", {"shape": tuple(shape)}) for shape in (to, back))
    return through(source, target, (forward,), (backward,))


def stack(source: str | Sequence[str], target: str, count: int) -> Rule:
    """The `count` tensors that `source` names through `{e}`, along a new first axis of `target`.

    Of several sources, the tensors with the same `e` come one after the other along the second axis.
    """
    names = (source,) if isinstance(source, str) else tuple(source)
    sources = tuple(name.replace("{e}", str(index)) for index in range(count) for name in names)
    if len(names) == 1:
        taken: tuple[Chain, ...] = tuple((Operation("take", {"index": index}),) for index in range(count))
        return Rule(sources, (target,), ((Operation("stack"),),), taken)
    parts = list(_equal(len(names), 0))
    backward = tuple((Operation("take", {"index": index}), *part) for index in range(count) for part in parts)
    return Rule(sources, (target,), ((Operation("stack"), Operation("fold", {"of": len(names)})),), backward)


def chain(*rules: Rule) -> Rule:
    """Rules of one tensor each, one after the other: from the first one's source to the last one's target."""
    forward = tuple(operation for rule in rules for operation in rule.forward[0])
    backward = tuple(operation for rule in reversed(rules) for operation in rule.backward[0])
    return Rule(rules[0].sources, rules[-1].targets, (forward,), (backward,))


def depthwise(source: str, targets: Sequence[str], sizes: Sequence[int] | None = None) -> Rule:
    """A depthwise `nn.Conv1d` weight `[C, 1, W]` to `[C, W]`, or cut along C into `targets` of `sizes` channels."""
    if sizes is None:
        (target,) = targets
        return Rule((source,), (target,), (_DROP_AXIS,), (_ADD_AXIS,))
    forward = [(*cut, *_DROP_AXIS) for cut in _slices(sizes, 0)]
    back: Chain = (Operation("concat", {"dim": 0}), *_ADD_AXIS)
    return Rule((source,), tuple(targets), tuple(forward), (back,))


def drop(source: str, same_as: str | None = None) -> Rule:
    """A tensor that says nothing new: a buffer that is recomputed, or a second copy of `same_as`."""
    return Rule((source,), (), (), (COPY,), same_as)


def inverse(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules that lead back; dropped tensors stay dropped."""
    return tuple(rule.inverse() for rule in rules if rule.targets and not rule.read_only)


def steps(rules: Sequence[Rule], tensors: Mapping[str, TensorSpec]) -> dict[str, Step]:
    """One step per target tensor, in the order of `tensors`. No tensor is read.

    Raises:
        ZooError: a tensor that no rule takes or that two take, a source that is missing, two rules for one target.
    """
    made: dict[str, Step] = {}
    used: set[str] = set()
    for name in tensors:
        for rule, numbers in _matching(rules, name):
            sources = tuple(source.format(**numbers) for source in rule.sources)
            _claim(sources, tensors, used)
            for step in _rule_steps(rule, sources, numbers, tensors):
                if step.target in made:
                    raise ZooError(f"tensors {made[step.target].sources[0]!r} and {name!r} both become {step.target!r}")
                made[step.target] = step
    if left := [name for name in tensors if name not in used]:
        raise ZooError(f"tensor {left[0]!r} is unexpected ({len(left)} such); the format has no place for it")
    return made


def duplicates(rules: Sequence[Rule], tensors: Mapping[str, TensorSpec]) -> Iterator[tuple[str, str]]:
    """Pairs of a tensor that the rules drop as a copy, and the tensor that it must equal."""
    for name in tensors:
        for rule, numbers in _matching(rules, name):
            if rule.same_as is not None:
                yield name, rule.same_as.format(**numbers)


def _matching(rules: Sequence[Rule], name: str) -> Iterator[tuple[Rule, dict[str, str]]]:
    for rule in rules:
        if (numbers := rule.match(name)) is not None:
            yield rule, numbers


def _claim(sources: Sequence[str], tensors: Mapping[str, TensorSpec], used: set[str]) -> None:
    for source in sources:
        if source not in tensors:
            raise ZooError(f"tensor {source!r} is missing; {sources[0]!r} cannot be converted without it")
        if source in used:
            raise ZooError(f"tensor {source!r} is claimed by two rules; a format must place each tensor once")
        used.add(source)


def _rule_steps(
    rule: Rule, sources: tuple[str, ...], numbers: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
) -> Iterator[Step]:
    empties = [torch.empty(tensors[name].shape, dtype=tensors[name].dtype, device="meta") for name in sources]
    for target, chain in zip(rule.targets, rule.forward, strict=True):
        try:
            result = run_chain(chain, empties)
        except (RuntimeError, IndexError) as error:
            detail = str(error).splitlines()[0]
            raise ZooError(f"tensor {sources[0]!r} of shape {tuple(empties[0].shape)} does not fit: {detail}") from None
        yield Step(target.format(**numbers), sources, chain, tuple(result.shape), result.dtype)


def _equal(count: int, dim: int) -> Iterator[Chain]:
    for index in range(count):
        yield (Operation("part", {"dim": dim, "index": index, "of": count}),)


def _slices(sizes: Sequence[int], dim: int) -> Iterator[Chain]:
    stops = list(accumulate(sizes))
    for start, stop in zip([0, *stops], stops, strict=False):
        yield (Operation("slice", {"dim": dim, "start": start, "stop": stop}),)
