"""Model specifications for the command line: `torchvision:resnet50`, `timm:…`, `transformers:…`, `file.py:function`.

Architectures are built with seeded random weights; nothing is downloaded. A local checkpoint fills them
in: safetensors, or a `.pt` file of tensors only (never a pickle).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
        checkpoint: weights to load: `.safetensors`, or `.pt`/`.pth`/`.bin` holding tensors only.
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
        return Path(spec), None
    source, separator, name = spec.rpartition(":")
    if not separator or not name:
        raise InvalidInput(
            f"'{spec}' names no model; write torchvision:NAME, timm:NAME, transformers:NAME, "
            "path/to/file.py:function or file.pt2"
        )
    torch.manual_seed(seed)
    builders: dict[str, Callable[[str], Any]] = {
        "torchvision": _torchvision,
        "timm": _timm,
        "transformers": _transformers,
    }
    made = builders[source](name) if source in builders else _from_file(Path(source), name)
    model, inputs = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"{spec} gives a {type(model).__name__}; expected an nn.Module")
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model, inputs


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Fills in weights from a file that holds tensors only.

    Raises:
        InvalidInput: no such file, a pickle, or names and shapes that don't fit.
    """
    if not path.is_file():
        raise InvalidInput(f"no file {path}")
    if path.suffix == ".safetensors":
        state = _import("safetensors.torch", "safetensors").load_file(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:
            raise InvalidInput(
                f"{path} holds more than tensors, and loading it would run its code; save model.state_dict() "
                "with torch.save, or use safetensors"
            ) from None
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{path} does not fit {type(model).__name__}: {error}") from None


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
    video = name in models.list_models(module=models.video)
    size = 299 if name == "inception_v3" else 112 if video else 224
    shape = (2, 3, 16, size, size) if video else (2, 3, size, size)
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
    if (folder / "config.json").is_file():
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = settings.pop("model_type", "")
    _check_name(kind, [*sorted(transformers.CONFIG_MAPPING.keys()), *_PRESETS], "transformers")
    architecture = next(iter(settings.get("architectures") or []), None)
    with quiet():
        config = transformers.AutoConfig.for_model(kind, **settings)
        if hasattr(config, "use_cache"):
            config.use_cache = False  # past keys and values are no part of one call
        if architecture is None:
            model: nn.Module = transformers.AutoModel.from_config(config)
        elif hasattr(transformers, architecture):
            model = getattr(transformers, architecture)(config)
        else:
            raise InvalidInput(f"this version of transformers has no {architecture}")
    if (folder / "model.safetensors").is_file():
        load_checkpoint(model, folder / "model.safetensors")
    return model


def _check_name(name: str | None, known: list[str], source: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise InvalidInput(f"{source} has no model '{name}'{hint}")


def _from_file(path: Path, function: str) -> Any:
    if path.suffix != ".py":
        raise InvalidInput(f"'{path}' is not torchvision, timm, transformers, or a Python file")
    made = call_from_file(path, function)
    if isinstance(made, tuple):
        model, inputs = made
        return model, as_inputs(inputs)
    return made


def call_from_file(path: Path, function: str) -> Any:
    """Runs a Python file of the user's and calls one of its functions without arguments.

    Raises:
        InvalidInput: no such file or function (near ones are suggested).
    """
    if not path.is_file():
        raise InvalidInput(f"no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = getattr(module, function, None)
    if not callable(made):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        near = difflib.get_close_matches(function, names, n=1)
        raise InvalidInput(f"{path} has no function '{function}'" + (f"; did you mean '{near[0]}'?" if near else ""))
    return made()
