"""Which ptxas assembles the kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from zoo.kernels import launch


@pytest.fixture
def settings(monkeypatch):
    """Triton's settings, with the ptxas 12.8 that it takes for Hopper and a later one."""
    made = SimpleNamespace(
        ptxas=SimpleNamespace(path="/old", version="12.8"),
        ptxas_blackwell=SimpleNamespace(path="/new", version="12.9"),
        ptxas_options=None,
    )
    triton = SimpleNamespace(knobs=SimpleNamespace(nvidia=made))

    def import_module(name):
        torch._dynamo.graph_break()  # no compiler can look into it
        return {"triton": triton}[name]

    monkeypatch.setattr(launch, "importlib", SimpleNamespace(import_module=import_module))
    monkeypatch.setattr(launch, "_assemblers", [])
    return made


@pytest.mark.parametrize(
    ("own", "other", "path"),
    [("12.8", "12.9", "/new"), ("13.1", "13.1", "/old"), ("12.10", "12.8", "/old"), ("12.8", "12.8", None)],
)
def test_first_ptxas_from_12_9_on(settings, own, other, path):
    settings.ptxas.version, settings.ptxas_blackwell.version = own, other
    assert launch.assembler() == path


def test_gpu_is_refused_without_a_right_ptxas(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = SimpleNamespace(device=torch.device("cuda"))
    assert launch.device_reason(x) is None
    settings.ptxas_blackwell = None
    launch._assemblers.clear()
    assert "ptxas before 12.9" in launch.device_reason(x)


def test_launches_alone_use_it(settings, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    own, seen = settings.ptxas, []

    class Kernel:
        def __getitem__(self, programs):
            return lambda *args, **options: seen.append((programs, args, options, settings.ptxas))

    settings.ptxas_options = "--warn-on-spills"
    launch.start(Kernel(), (3,), 1, num_warps=2)
    launch.start(Kernel(), (0,), 1)
    with launch.held_back():
        launch.start(Kernel(), (3,), 1)
    options = {"num_warps": 2, "ptx_options": "--warn-on-spills --verbose"}
    assert seen == [((3,), (1,), options, "/new")]
    assert settings.ptxas is own


def test_compilers_take_it_as_a_constant(settings):
    def call(x):
        return x + 1 if launch.assembler() == "/new" else x

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
