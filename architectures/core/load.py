"""Weights in and out: any supported checkpoint to a model, strictly, and a model to a directory, atomically."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo import registry
from zoo.architectures.core import formats
from zoo.architectures.core.checkpoint import read_json
from zoo.architectures.core.hub import TOKENIZER_FILES, one_line, resolve
from zoo.architectures.core.rules import inverse, steps
from zoo.architectures.core.shards import Spec, atomic_directory, write_json, write_tensors
from zoo.errors import ZooError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zoo.architectures.core.methods import Choice
    from zoo.architectures.core.modeling import ZooForCausalLM
    from zoo.architectures.core.zoo_config import ZooConfig

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")


class Deferred:
    """A tensor that is made when transformers slices it, so that loading streams: few tensors in memory at a time."""

    def __init__(self, make: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> None:
        self._make, self.shape, self.dtype = make, torch.Size(shape), dtype

    def __getitem__(self, index: Any) -> Tensor:
        # a copy of the mapped file: a later change of the file must not reach the model
        return self._make().clone(memory_format=torch.contiguous_format)[index]

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


def from_pretrained(
    name_or_path: str | Path,
    *,
    attention: str | Path | None = None,
    attention_args: Mapping[str, Any] | None = None,
    dense_layers: Sequence[int] = (),
    **kwargs: Any,
) -> Any:
    """A model with the weights of `name_or_path`.

    Args:
        name_or_path: a released checkpoint, a directory (ours or of a supported published format), or a hub id.
        attention: a training-free method to attend by: its mixer's name, a file of `zoo calibrate`, or one for
            prefill and one for decode (`"xattention+quest"`). A checkpoint that is not ours, of any softmax model
            that transformers knows, then keeps transformers' class.
        attention_args: options of the method; of two methods, by the names of the methods.
        dense_layers: layers that keep their attention.
        **kwargs: as in transformers: `dtype` (default: that of the checkpoint), `device_map`, `attn_implementation`,
            `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`, ...

    Returns:
        A `ZooForCausalLM` (`ZooForMaskedLM`), or with `attention` transformers' own class.

    Raises:
        ZooError: nothing of that name, an unsupported or corrupt checkpoint, weights that do not fit the config, or a
            method that does not fit the model.
    """
    from zoo.architectures.core.methods import Choice

    if attention is None and (attention_args or dense_layers):
        raise ZooError("attention_args and dense_layers are about a method; name it with attention=")
    choice = None if attention is None else Choice.parse(attention, attention_args, dense_layers)
    where = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
    path = resolve(name_or_path, **where)
    if choice is not None and read_json(path / "config.json", "config").get("model_type") != "zoo":
        model = _foreign(path, choice, kwargs)
    else:
        canonical = formats.read(path)
        model, info = _load(canonical if choice is None else _swapped(canonical, choice), path, kwargs)
        _check_loaded(path, info)
    model.config._name_or_path = str(name_or_path)
    return model


def _check_loaded(path: Path, info: Mapping[str, Any]) -> None:
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(what):
            first = min(map(str, info[what]))
            raise ZooError(f"{path}: {what.replace('_', ' ')}: {first}; the weights do not fit the config")


def _swapped(canonical: formats.Canonical, choice: Choice) -> formats.Canonical:
    """Our checkpoint with the methods' mixers, which have the weights of `attention`."""
    layers = choice.swapped(canonical.decoder).to_dict()["layers"]
    config = type(canonical.config).from_dict({**canonical.config.to_dict(), "layers": layers})
    return replace(canonical, config=config)


def _foreign(path: Path, choice: Choice, kwargs: Mapping[str, Any]) -> Any:
    """A model of transformers' own class that attends by `choice`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from zoo.architectures.core import foreign

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        cls = AutoModelForCausalLM._model_mapping[type(config)]
    except (KeyError, ValueError, OSError) as error:
        raise ZooError(
            f"transformers has no language model for {path} ({one_line(error)}); zoo.save makes it ours first"
        ) from None
    foreign.check(config, cls, choice)
    dtype = kwargs.get("torch_dtype") or kwargs.get("dtype") or "auto"
    options = {name: value for name, value in kwargs.items() if name not in ("torch_dtype", "dtype")}
    try:
        model, info = cls.from_pretrained(path, config=config, dtype=dtype, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ZooError(f"{path} cannot be loaded: {one_line(error)}") from None
    _check_loaded(path, info)
    foreign.attach(model, choice)
    return model


def from_canonical(canonical: formats.Canonical, dtype: torch.dtype | None = None) -> ZooForCausalLM:
    """The model of a checkpoint that has been read by `formats.read`."""
    return _load(canonical, canonical.checkpoint.path, {"dtype": dtype or canonical.dtype})[0]


def assemble(config: ZooConfig, state: Mapping[str, Deferred], **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """The model of `config` with the weights `state`, and transformers' loading report."""
    from zoo.architectures.core import modeling

    cls = modeling.model_class(config)
    model, info = cls.from_pretrained(None, config=config, state_dict=dict(state), output_loading_info=True, **kwargs)
    return model, info


def _load(canonical: formats.Canonical, path: Path, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    arguments = dict(kwargs)
    dtype = arguments.pop("torch_dtype", None) or arguments.pop("dtype", None)
    arguments["dtype"] = canonical.dtype if dtype in (None, "auto") else dtype
    state = {
        name: Deferred(partial(step.run, canonical.checkpoint.get), step.shape, step.dtype)
        for name, step in canonical.steps.items()
    }
    model, info = assemble(canonical.config, state, **arguments)
    _set_generation_config(model, path)
    return model, info


def _set_generation_config(model: Any, path: Path) -> None:
    if (path / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(path)


def tokenizer(name_or_path: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; `kwargs` are those of `from_pretrained` that find it.

    Raises:
        ZooError: nothing of that name, or no tokenizer in it.
    """
    from transformers import AutoTokenizer

    from zoo.architectures.core import modeling

    modeling.register()
    path = resolve(name_or_path, **kwargs)
    if not any((path / file).is_file() for file in TOKENIZER_FILES):
        raise ZooError(f"{path} has no tokenizer; put its {TOKENIZER_FILES[0]} (or {TOKENIZER_FILES[1]}) there")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ZooError(f"tokenizer of {path} cannot be loaded: {one_line(error)}; download it again") from None


def save(
    model: ZooForCausalLM,
    out: str | Path,
    *,
    format: str = "zoo",
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a checkpoint directory: whole, or not at all.

    Args:
        model: the model.
        out: a path where nothing is yet.
        format: `zoo`; `published`, the format that the model came from or that can express it; or a source's name.
        tokenizer: saved beside it, if given.
        max_shard_size: bytes, or text such as "500MB".

    Raises:
        ZooError: `out` exists, or the format cannot express the model.
    """
    config, rules = _target(model, format)
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    made = steps(rules, specs) if rules is not None else None
    with atomic_directory(Path(out)) as folder:
        write_json(folder / "config.json", config)
        if made is None:
            write_tensors(folder, specs, state.__getitem__, max_shard_size)
        else:
            planned = {name: Spec(step.shape, step.dtype) for name, step in made.items()}
            write_tensors(folder, planned, lambda name: made[name].run(state.__getitem__), max_shard_size)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Path(out)


def _target(model: ZooForCausalLM, format: str) -> tuple[dict[str, Any], Any]:
    """The config to write and the rules from our names to the format's (None: our own names)."""
    if format == "zoo":
        config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": _dtype_name(model)}
        config.pop("_name_or_path", None)
        return config, None
    carried = {name: getattr(model.config, name, None) for name in formats.CARRIED}
    carried = {name: value for name, value in carried.items() if value is not None} | {"dtype": _dtype_name(model)}
    module, config = _publisher(model, format, carried)
    return config, inverse(formats.rules_of(module, config))


def _publisher(model: ZooForCausalLM, format: str, carried: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if format != "published":
        names = [format]
    elif came_from := getattr(model.config, "source_format", None):
        names = [came_from]
    else:
        names = registry.names("sources")
    refused = []
    for name in names:
        module = registry.load("sources", name)
        try:
            return module, module.published(model.config.decoder_config, carried)
        except ZooError as error:
            refused.append(f"{name}: {error}")
    raise ZooError(f"no published format can express this model ({'; '.join(refused)})")


def _dtype_name(model: ZooForCausalLM) -> str:
    return str(model.dtype).removeprefix("torch.")
