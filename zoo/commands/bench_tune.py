"""`zoo bench kernels --tune`: which tile sizes, warps and stages suit this GPU, written to kernels/choices.

The kernels of a case are varied one number after the other; what a choice is worth is the time of the whole call, and
one that fails or gives wrong results is passed over.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from zoo.commands.bench import pick
from zoo.commands.bench_cases import Case, caller, gate, kernels, watched
from zoo.commands.bench_timing import rotated, timed
from zoo.errors import ZooError

Choice = dict[str, int]
GRID = {"num_warps": (2, 4, 8), "num_stages": (1, 2, 3, 4)}
TILES = (16, 32, 64, 128)
GAIN = 0.98  # smaller differences are noise


def candidates(choice: Choice) -> Iterator[Choice]:
    """Every change of one number: to another of its grid, or of a tile to half and twice its size."""
    for name, value in choice.items():
        values = GRID.get(name) or [tile for tile in (value // 2, 2 * value) if tile in TILES]
        yield from (choice | {name: other} for other in values if other != value)


@contextmanager
def asked() -> Iterator[dict[tuple[str, str], Choice]]:
    """The choices that calls inside are launched with, by kernel and key; changing one changes what follows."""
    launch, found = kernels("launch"), {}

    def note(values: Choice, kernel: str, width: int, x: Tensor) -> None:
        table = launch.choices(launch.family(x.device))[kernel]
        found[kernel, next(key for key, entry in table.items() if entry is values)] = values

    with watched("launch", "choice", note):
        yield found


def tune(ops: list[str] | None, dtype: str) -> list[tuple[str, ...]]:
    """Improve the choices of every kernel that the cases of `ops` launch; the first case of a key decides. For each
    change: kernel, key, the choice before, the choice now and how many times faster the call became."""
    if not torch.cuda.is_available():
        raise ZooError("--tune needs a GPU")
    changed: list[tuple[str, ...]] = []
    seen: set[tuple[str, str]] = set()
    for case in (case for case in pick(ops, dtype, None, "cuda") if case.direction != "fwd"):
        with asked() as found:
            wrong = gate(case, "cuda")
        new = {} if wrong else {key: entry for key, entry in found.items() if key not in seen}
        sets = rotated(case, "cuda") if new else []
        better: list[tuple[str, ...]] = []
        for (kernel, key), entry in new.items():
            before, first = dict(entry), milliseconds(case, sets)
            best = improve(case, sets, entry, first)
            if best < first:
                better.append((kernel, key, str(before), str(entry), f"{first / best:.2f}"))
                print(*better[-1], flush=True)
        for kernel in {row[0] for row in better}:
            keep(kernel)
        seen, changed = seen | set(new), changed + better
    return changed


def milliseconds(case: Case, sets: list[dict[str, Tensor]]) -> float:
    return float(timed(case, caller(case), sets)["zoo_ms"])


def improve(case: Case, sets: list[dict[str, Tensor]], entry: Choice, best: float) -> float:
    """Take the best neighbour as long as there is a better one; `entry` ends as the best, whose time is returned."""
    while True:
        start, chosen = dict(entry), None
        for other in candidates(start):
            entry.update(other)
            try:
                found = milliseconds(case, sets)
                if found < best * GAIN and not gate(case, "cuda"):
                    best, chosen = found, other
            except Exception:  # too large a tile, too few registers, a shape that the kernel refuses
                torch.cuda.empty_cache()
        entry.update(chosen or start)
        if chosen is None:
            return best


def keep(kernel: str) -> None:
    """Write all choices of a kernel to the family's file: there they stand in place of the default's."""
    launch = kernels("launch")
    name = launch.family(torch.device("cuda"))
    # Copied first: `record` forgets what was read.
    for key, values in {key: dict(values) for key, values in launch.choices(name)[kernel].items()}.items():
        launch.record(name, kernel, key, values)
