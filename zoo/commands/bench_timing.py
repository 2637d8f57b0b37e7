"""How long a case of `zoo bench kernels` takes, on the device's own clock, and how long it must take at least."""

import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from zoo.commands.bench_cases import Case, operations, tensors, traffic

Tensors = dict[str, Tensor]
Call = Callable[[Tensors], Any]
Steps = list[Callable[[], Any]]
ROTATED = 200e6  # bytes of inputs in turn, more than any cache holds


def rotated(case: Case, device: str) -> list[Tensors]:
    """Sets of inputs, together larger than the caches; a step rotates over four states."""
    first = tensors(case, device)
    size = sum(x.nbytes for x in first.values())
    count = 2 if device == "cpu" else 4 if case.direction == "decode" else max(2, -int(-ROTATED // size))
    return [first] + [tensors(case, device, seed) for seed in range(1, count)]


def timed(case: Case, call: Call, sets: list[Tensors], who: str = "zoo") -> dict[str, str]:
    """Medians in ms of one call, replayed in a CUDA graph and launched one by one, and the memory that it adds."""
    steps: Steps = [partial(call, made) for made in sets]
    if both := case.direction == "fwdbwd":
        weight = torch.randn_like(steps[0]())
        sets = [{name: x.detach().requires_grad_() for name, x in made.items()} for made in sets]
        steps = [partial(gradients, call, made, weight) for made in sets]
    with torch.set_grad_enabled(both):
        if not torch.cuda.is_available():
            eager = short(clock(steps))
            return {f"{who}_ms": eager, f"{who}_eager_ms": eager}
        for step in steps * 2:
            step()
        eager = short(events(steps))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        steps[0]()
        gib = short((torch.cuda.max_memory_allocated() - before) / 2**30)
        return {f"{who}_ms": short(graphed(steps)), f"{who}_eager_ms": eager, f"{who}_gib": gib}


def gradients(call: Call, made: Tensors, weight: Tensor) -> Any:
    return torch.autograd.grad(call(made), list(made.values()), weight, allow_unused=True)


def short(value: float) -> str:
    return f"{value:.4g}"


def graphed(steps: Steps) -> float:
    """All steps in one graph, so that their launches cost nothing on the host; ms of one."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps:
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    found = events([graph.replay]) / len(steps)
    graph.reset()
    return found


def events(steps: Steps, seconds: float = 0.1) -> float:
    begin, marks = clock(steps, torch.cuda.synchronize), []
    for i in range(min(max(12, int(1e3 * seconds / begin)), 200)):
        marks.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        marks[-1][0].record()
        steps[i % len(steps)]()
        marks[-1][1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in marks)


def clock(steps: Steps, wait: Callable[[], Any] = lambda: None) -> float:
    spans = []
    for step in steps * 3:
        begin = time.perf_counter()
        step()
        wait()
        spans.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(spans)


def floor(case: Case, made: Tensors, device: str) -> float:
    """Milliseconds: the bytes that must move at the measured bandwidth, or the operations at the measured rate."""
    bandwidth, rate = speeds(device, case.torch_dtype)
    return max(traffic(case, made) / bandwidth, operations(case) / rate)


@cache
def speeds(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Per ms: bytes read and written by a copy, multiplications and additions of a large product."""
    median, count, size = (events, 2**30, 8192) if device == "cuda" else (clock, 2**22, 256)
    x, factor = torch.zeros(count, device=device), torch.randn(size, size, device=device).to(dtype)
    y = torch.empty_like(x)
    return 2 * x.nbytes / median([lambda: y.copy_(x)] * 3), 2 * size**3 / median([lambda: factor @ factor] * 3)
