"""The implementations that `zoo bench kernels --against` runs beside ours: flash-linear-attention, SDPA, FlexAttention.

A peer is a function of a case's tensors that returns its output. Its autotuner runs before anything is timed.
"""

import importlib
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import Tensor

from zoo.commands.bench_cases import Case, options
from zoo.errors import ZooError

Peer = Callable[[dict[str, Tensor]], Any]
NAMES = ("fla", "sdpa", "flex")
UNIT = {"use_qk_l2norm_in_kernel": True}
# Module and function of flash-linear-attention, what it calls our tensors, and fixed arguments, by op and variant.
GATED = {"decay": "g"}
FLA: dict[tuple[str, str], tuple[str, dict[str, str], dict[str, Any]]] = {
    ("linear_attention", "none"): ("simple_gla.chunk_simple_gla", {}, {}),
    ("linear_attention", "head"): ("simple_gla.chunk_simple_gla", {"decay": "g_gamma"}, {}),
    ("linear_attention", "token"): ("simple_gla.chunk_simple_gla", GATED, {}),
    ("linear_attention", "channel"): ("gla.chunk_gla", GATED, {}),
    ("delta_rule", "none"): ("delta_rule.chunk_delta_rule", {}, UNIT),
    ("delta_rule", "token"): ("gated_delta_rule.chunk_gated_delta_rule", GATED, UNIT),
    ("delta_rule", "channel"): ("kda.chunk_kda", GATED, UNIT),
    ("dplr", "channel"): ("rwkv7.chunk_rwkv7", {"q": "r", "decay": "w"}, {"scale": 1.0}),
    ("scan", "channel"): ("hgrn.chunk_hgrn", GATED, {}),
}


def names(case: Case, wanted: list[str]) -> list[str]:
    """The peers among `wanted` that can run a case."""
    if unknown := set(wanted) - set(NAMES):
        raise ZooError(f"--against was {', '.join(unknown)}; it must be among {', '.join(NAMES)}")
    own = {"fla": (case.op, case.variant) in FLA}
    if case.op == "attention":
        own |= {"sdpa": not case.options, "flex": bool(case.options)}
    return [name for name in wanted if own.get(name)]


def load(name: str, case: Case) -> tuple[Peer, str]:
    """The peer and what has to be said of its results."""
    if name == "fla":
        return _fla(case)
    return (partial(_sdpa, case=case) if name == "sdpa" else partial(_flex, case=case)), ""


def compile_only() -> None:
    """From here on, flash-linear-attention's autotuner compiles every choice, runs it once and keeps no result."""
    os.environ["FLA_CACHE_RESULTS"] = "0"
    _benchmarker(lambda call, quantiles=None, **_: call() or [1.0] * len(quantiles or [0]))


def tune_quickly() -> None:
    """Its autotuner takes 5 ms to warm up and 20 ms to time each choice."""
    from triton.testing import do_bench

    _benchmarker(partial(do_bench, warmup=5, rep=20))


def _benchmarker(run: Callable[..., Any]) -> None:
    driver: Any = importlib.import_module("triton.backends.nvidia.driver")
    driver.CudaDriver.get_benchmarker = lambda self: run


@cache
def _fla_function(path: str) -> Callable[..., Any]:
    os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = "1"
    module, _, name = f"fla.ops.{path}".rpartition(".")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ZooError(f"--against fla needs flash-linear-attention: {error}") from None
    # It refuses gated gradients on Hopper before this release, because they come out wrong.
    common: Any = importlib.import_module("fla.ops.common.chunk_o")
    common.TRITON_ABOVE_3_7_1 = True
    return found


def _fla(case: Case) -> tuple[Peer, str]:
    path, renamed, fixed = FLA[case.op, case.variant]
    step = case.direction == "decode"
    if step:
        path = path.replace(".chunk_", ".fused_recurrent_")
        fixed = fixed | {"output_final_state": True}
        renamed = renamed | {"state": "initial_state"} | ({"decay": "gk"} if path.startswith("gla") else {})
    function = _fla_function(path)
    triton: Any = importlib.import_module("triton")
    old = tuple(map(int, triton.__version__.split(".")[:3])) < (3, 7, 1)
    wrong = old and case.direction == "fwdbwd" and case.variant == "token"

    def run(made: dict[str, Tensor]) -> Any:
        given = {renamed.get(name, name): x for name, x in made.items()}
        result = function(**given, **fixed)
        return result if step else result[0]

    return run, "wrong gradients on this triton" if wrong else ""


def _sdpa(made: dict[str, Tensor], case: Case) -> Tensor:
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (made[name].transpose(1, 2) for name in "qkv")
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


@cache
def _flex_function(length: int, window: int, device: str) -> Callable[..., Any]:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < window), None, None, length, length, device=device)
    return partial(torch.compile(flex_attention), block_mask=mask)


def _flex(made: dict[str, Tensor], case: Case) -> Any:
    q, k, v = (made[name].transpose(1, 2) for name in "qkv")
    return _flex_function(case.T, options(case)["window"], q.device.type)(q, k, v).transpose(1, 2)
