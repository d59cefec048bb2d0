"""Model specifications for the command line: `torchvision:resnet50`, `timm:…`, `transformers:…`, `file.py:function`.

Architectures are built with seeded random weights; nothing is downloaded. A local checkpoint fills them
in: safetensors, or a `.pt` file of tensors only (never a pickle).
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import pickle
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lobo_fx.artifact import read_json
from lobo_fx.errors import InvalidInput
from lobo_fx.inputs import Inputs, as_inputs
from lobo_fx.quiet import quiet
from lobo_fx.tracing import Model

_TORCHVISION_OPERATORS = ("nms", "qnms")
_library: torch.library.Library | None = None


def declare_torchvision_operators() -> None:
    """Declares `torchvision::nms` and `torchvision::qnms` where torchvision's binary could not register them.

    torchvision's wheels are built against CUDA. Beside a CPU-only torch their library does not load, and
    `import torchvision` (and with it timm and parts of transformers) fails on the missing operators. Declared
    without an implementation they let the import through; calling them still fails. Call it before the first
    import of torchvision; it does nothing where the operators are there.
    """
    global _library
    if _library is not None or any(hasattr(torch.ops.torchvision, name) for name in _TORCHVISION_OPERATORS):
        return
    _load_torchvision_binary()
    missing = [name for name in _TORCHVISION_OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        _library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in missing:
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]


def _load_torchvision_binary() -> None:
    """Loads the operators of a torchvision that fits this torch, as its own import would."""
    found = importlib.util.find_spec("torchvision")
    if found is None or not found.submodule_search_locations:
        return
    for library in Path(next(iter(found.submodule_search_locations))).glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        except OSError:
            return


def build(spec: str, checkpoint: Path | None = None, seed: int = 0) -> tuple[Model, Inputs | None]:
    """Builds the model that a specification names.

    Args:
        spec: `torchvision:NAME`, `timm:NAME`, `transformers:NAME` (a model type such as `whisper-tiny` or
            `bert`, or a folder with a `config.json`), `path/to/file.py:function` (called without
            arguments; returns a model, or a model and its example inputs), or `file.pt2`.
        checkpoint: weights to load, see `load_checkpoint`.
        seed: of the random weights.

    Returns:
        The model, and example inputs where the specification gives them.

    Raises:
        InvalidInput: an unknown name (near ones are suggested), a missing package or file, or a checkpoint
            that does not fit.
    """
    if spec.endswith(".pt2"):
        if checkpoint is not None:
            raise InvalidInput("a .pt2 file holds its own weights; leave out the checkpoint")
        if not Path(spec).is_file():
            raise InvalidInput(f"no file {spec}")
        return Path(spec), None
    builders: dict[str, Callable[[str], Any]] = {
        "torchvision": _torchvision,
        "timm": _timm,
        "transformers": _transformers,
    }
    library, _, name = spec.partition(":")
    file, _, function = spec.rpartition(":")
    if not (name if library in builders else function and file.endswith(".py")):
        raise InvalidInput(
            f"'{spec}' names no model; write torchvision:NAME, timm:NAME, transformers:NAME, "
            "path/to/file.py:function or file.pt2"
        )
    torch.manual_seed(seed)
    made = builders[library](name) if library in builders else _from_file(Path(file), function)
    model, inputs = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"{spec} gives a {type(model).__name__}; expected an nn.Module")
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model, inputs


def weights_are_random(spec: str, checkpoint: Path | None) -> bool:
    """Whether `build` makes up the weights, as far as the specification tells."""
    library, _, name = spec.partition(":")
    if checkpoint is not None or library not in ("torchvision", "timm", "transformers"):
        return False
    return library != "transformers" or not _is_config(Path(name)) or _weights_in(Path(name)) is None


def _is_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Fills in weights from files that hold tensors only.

    Every parameter and buffer of the model must be there, or share its memory with one that is. A Hugging Face
    checkpoint may be that of the model with a head, or of the model without: names are then matched by the
    model's `base_model_prefix`, and the head's weights left out.

    Args:
        model: changed in place, when all fits.
        path: `.safetensors`, or `.pt`/`.pth`/`.bin` holding tensors only; an index of shards, or a folder as
            `save_pretrained` writes it.

    Raises:
        InvalidInput: no such file, a damaged one, a pickle, or names and shapes that don't fit.
    """
    state = _read_checkpoint(path)
    own = model.state_dict(keep_vars=True)
    state = _renamed(state, own, getattr(model, "base_model_prefix", ""))
    filled = {id(own[name]) for name in own.keys() & state.keys()}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    problems = {
        "missing": [name for name, tensor in own.items() if id(tensor) not in filled],
        "unexpected": [n for n in state if n not in own and not any(re.search(pattern, n) for pattern in ignored)],
        "of another shape": [
            f"{name} ({list(state[name].shape)}, the model has {list(tensor.shape)})"
            for name, tensor in own.items()
            if name in state and isinstance(tensor, torch.Tensor) and state[name].shape != tensor.shape
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{kind}: {_first_few(names)}" for kind, names in problems.items() if names)
        raise InvalidInput(f"{path} does not fit {type(model).__name__}; {told}")
    model.load_state_dict(state, strict=False)


def _renamed(state: dict[str, torch.Tensor], own: Mapping[str, Any], prefix: str) -> dict[str, torch.Tensor]:
    """The checkpoint under the model's names: as it is, or with the prefix of the base model taken off or put on."""
    dot = f"{prefix}."
    without = {name.removeprefix(dot): tensor for name, tensor in state.items() if name.startswith(dot)}
    candidates = [state, *([without, {dot + name: tensor for name, tensor in state.items()}] if prefix else [])]
    return max(candidates, key=lambda candidate: len(own.keys() & candidate.keys()))


def _first_few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


_WEIGHT_FILES = tuple(
    name + index for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")
)


def _weights_in(folder: Path) -> Path | None:
    """The file that Hugging Face's `save_pretrained` put the weights in."""
    return next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)


def _read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    if path.is_dir():
        found = _weights_in(path)
        if found is None:
            raise InvalidInput(f"{path} holds none of {', '.join(_WEIGHT_FILES)}")
        path = found
    if not path.is_file():
        raise InvalidInput(f"no file {path}")
    if not path.stat().st_size:
        raise InvalidInput(f"{path} is empty")
    if path.suffix == ".json":
        return _read_shards(path)
    state = read_safetensors(path) if path.suffix == ".safetensors" else _read_pt(path)
    others = [name for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]
    if others:
        raise InvalidInput(
            f"{path} holds more than named tensors ({_first_few(others)}); save model.state_dict() alone"
        )
    return state


def _read_shards(path: Path) -> dict[str, torch.Tensor]:
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(map(_is_shard, files.values())):
        raise InvalidInput(f"{path} is no index of shards: it has no 'weight_map' from names to files beside it")
    state: dict[str, torch.Tensor] = {}
    for file in sorted(set(files.values())):
        state |= _read_checkpoint(path.parent / file)
    return state


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and not name.endswith(".json")


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file.

    Raises:
        InvalidInput: the file is damaged, or safetensors is not installed.
    """
    try:
        state: dict[str, torch.Tensor] = _import("safetensors.torch", "safetensors").load_file(path)
    except InvalidInput:
        raise
    except Exception as error:
        raise InvalidInput(f"{path} is damaged or no safetensors file: {error}") from error
    return state


def _read_pt(path: Path) -> dict[str, Any]:
    try:
        with quiet():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch names the global that a pickle asks for; anything else is no checkpoint
        if not isinstance(error, pickle.UnpicklingError) or "GLOBAL" not in str(error):
            raise InvalidInput(f"{path} is damaged, or was not written by torch.save") from error
        raise InvalidInput(
            f"{path} holds more than tensors, and loading it would run its code; save model.state_dict() "
            "with torch.save, or use safetensors"
        ) from error
    if not isinstance(state, dict):
        raise InvalidInput(f"{path} holds a {type(state).__name__}; expected model.state_dict()")
    return {str(name): tensor for name, tensor in state.items()}


def _import(module: str, package: str) -> Any:
    try:
        with quiet():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name.partition(".")[0]):
            raise
        raise InvalidInput(f"{package} is not installed; run: pip install 'lobo-fx[models]'") from None


def _torchvision(name: str) -> tuple[nn.Module, Inputs | None]:
    declare_torchvision_operators()
    models = _import("torchvision.models", "torchvision")
    known = models.list_models()
    _check_name(name, known, "torchvision")
    with quiet():
        options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
            options["weights_backbone"] = None  # otherwise the backbone's weights are downloaded
        model = models.get_model(name, weights=None, **options)
    size = [299, 299] if name == "inception_v3" else [224, 224]
    if name in models.list_models(module=models.video):  # of these, the weights' description tells
        size = [16, *models.get_model_weights(name).DEFAULT.transforms.keywords["crop_size"]]
    shape = (2, 3, *size)
    return model, Inputs((torch.randn(shape, generator=torch.Generator().manual_seed(0)),))


def _timm(name: str) -> nn.Module:
    declare_torchvision_operators()
    timm = _import("timm", "timm")
    _check_name(name.partition(".")[0], timm.list_models(), "timm")
    with quiet():
        model: nn.Module = timm.create_model(name, pretrained=False)
    return model


# Sizes of well-known checkpoints whose configuration class has other defaults; weights are random all the same.
_WHISPER_TINY = {
    "d_model": 384,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
}
_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "whisper-tiny": ("whisper", _WHISPER_TINY),
    "bert-base": ("bert", {}),
    "gpt2": ("gpt2", {}),
    "vit-base": ("vit", {}),
}


def _transformers(name: str) -> nn.Module:
    declare_torchvision_operators()
    transformers = _import("transformers", "transformers")
    folder = Path(name)
    kind, settings = _PRESETS.get(name, (name, {}))
    if _is_config(folder):
        settings = read_json(folder / "config.json")
        kind = settings.pop("model_type", "")
    known = [*sorted(transformers.CONFIG_MAPPING.keys()), *_PRESETS]
    if kind not in known and folder.is_dir() and not _is_config(folder):
        raise InvalidInput(f"the folder {folder} has no config.json, so it names no model")
    _check_name(kind, known, "transformers")
    architecture = settings.get("architectures")
    try:
        with quiet():
            config = transformers.AutoConfig.for_model(kind, **settings)
            if hasattr(config, "use_cache"):
                config.use_cache = False  # past keys and values are no part of one call
            if architecture:
                model: nn.Module = _architecture(transformers, architecture)(config)
            else:
                model = transformers.AutoModel.from_config(config)
    except InvalidInput:
        raise
    except Exception as error:
        raise InvalidInput(f"transformers can't build '{name}': {type(error).__name__}: {error}") from error
    if _is_config(folder) and (weights := _weights_in(folder)) is not None:
        load_checkpoint(model, weights)
    return model


def _architecture(transformers: Any, names: Any) -> Any:
    """The class that a configuration names; anything of transformers but a model is refused."""
    name = names[0] if isinstance(names, list) and isinstance(names[0], str) else ""
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise InvalidInput(f"architectures is {names!r}, which names no model of this version of transformers")
    return found


def _check_name(name: str | None, known: list[str], source: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise InvalidInput(f"{source} has no model '{name}'{hint}")


def _from_file(path: Path, function: str) -> Any:
    made = call_from_file(path, function)
    if not isinstance(made, tuple):
        return made
    if len(made) != 2:
        raise InvalidInput(f"{path}:{function} returns {len(made)} values; expected a model, or a model and its inputs")
    return made[0], as_inputs(made[1])


def call_from_file(path: Path, function: str) -> Any:
    """Runs a Python file of the user's and calls one of its functions without arguments.

    As when Python itself runs a file, it can import what lies beside it.

    Raises:
        InvalidInput: no such file or function (near ones are suggested), or its code fails; the message names the line.
    """
    if not path.is_file():
        raise InvalidInput(f"no file {path}")
    name = f"lobo_fx_file_{path.stem}"  # as it is, the name could hide a module that is imported
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _importable(path.absolute().parent):
        try:
            spec.loader.exec_module(module)
            made = getattr(module, function, None)
            if callable(made):
                return made()
        except (Exception, SystemExit) as error:
            raise InvalidInput(f"{_place(path, error)}: {type(error).__name__}: {error}") from error
    names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    near = difflib.get_close_matches(function, names, n=1)
    raise InvalidInput(f"{path} has no function '{function}'" + (f"; did you mean '{near[0]}'?" if near else ""))


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _place(path: Path, error: BaseException) -> str:
    """The last line of the user's file that an exception passed through."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path.absolute()]
    return f"{path}:{lines[-1]}" if lines else str(path)
