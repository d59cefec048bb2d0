"""Models of torchvision, timm and transformers, built with seeded random weights."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lobo_fx.errors import InvalidInput
from lobo_fx.files import read_json
from lobo_fx.graph.inputs import Inputs
from lobo_fx.sources.checkpoints import load_checkpoint, weights_in
from lobo_fx.sources.packages import check_name, import_package
from lobo_fx.sources.torchvision_operators import declare_torchvision_operators
from lobo_fx.terminal.quiet import quiet

__all__ = ["head_outputs", "is_config", "timm_model", "torchvision_model", "transformers_model"]


def is_config(folder: Path) -> bool:
    return os.path.isfile(folder / "config.json")  # unlike `Path.is_file`, takes any text for a path


def torchvision_model(name: str) -> tuple[nn.Module, Inputs | None]:
    declare_torchvision_operators()
    models = import_package("torchvision.models", "torchvision")
    known = models.list_models()
    check_name(name, known, "torchvision")
    with quiet():
        options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
            options["weights_backbone"] = None  # otherwise the backbone's weights are downloaded
        model = models.get_model(name, weights=None, **options)
    size = [299, 299] if name == "inception_v3" else [224, 224]
    if name in models.list_models(module=models.video):  # for these, the weights' transforms state the size
        size = [16, *models.get_model_weights(name).DEFAULT.transforms.keywords["crop_size"]]
    shape = (2, 3, *size)
    return model, Inputs((torch.randn(shape, generator=torch.Generator().manual_seed(0)),))


def timm_model(name: str) -> nn.Module:
    declare_torchvision_operators()
    timm = import_package("timm", "timm")
    check_name(name.partition(".")[0], timm.list_models(), "timm")
    with quiet():
        model: nn.Module = timm.create_model(name, pretrained=False)
    return model


# Sizes of well-known checkpoints where the configuration class has other defaults; weights are still random.
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

# Tasks for configurations that name no architecture: the first one that the model type has a head for is taken.
_TASKS = (
    *("Seq2SeqLM", "SpeechSeq2Seq", "MaskedLM", "CausalLM", "CTC", "ZeroShotImageClassification", "ObjectDetection"),
    *("ImageClassification", "VideoClassification", "AudioClassification", "SemanticSegmentation"),
    *("UniversalSegmentation", "DepthEstimation", "MaskGeneration", "ImageTextToText"),
)


def transformers_model(name: str) -> nn.Module:
    declare_torchvision_operators()
    transformers = import_package("transformers", "transformers")
    folder = Path(name)
    kind, settings = _PRESETS.get(name, (name, {}))
    if is_config(folder):
        settings = read_json(folder / "config.json")
        kind = settings.pop("model_type", "")
    known = [*sorted(transformers.CONFIG_MAPPING.keys()), *_PRESETS]
    if kind not in known and os.path.isdir(folder) and not is_config(folder):
        raise InvalidInput(f"the folder {folder} has no config.json, so it names no model")
    check_name(kind, known, "transformers")
    architecture = settings.get("architectures")
    try:
        with quiet():
            config = transformers.AutoConfig.for_model(kind, **settings)
            if hasattr(config, "use_cache"):
                config.use_cache = False  # a cache of keys and values is not part of a single call
            if architecture:
                model: nn.Module = _architecture(transformers, architecture)(config)
            else:
                model = _auto_class(transformers, config).from_config(config)
    except InvalidInput:
        raise
    except Exception as error:
        raise InvalidInput(f"transformers can't build '{name}': {type(error).__name__}: {error}") from error
    if is_config(folder) and (weights := weights_in(folder)) is not None:
        load_checkpoint(model, weights)
    return model


def _auto_class(transformers: Any, config: Any) -> Any:
    """The auto class for the first task that a configuration's model has a head for; else the one without a head."""
    for task in _TASKS:
        auto = getattr(transformers, f"AutoModelFor{task}", None)
        if auto is not None and type(config) in auto._model_mapping:
            return auto
    return transformers.AutoModel


def head_outputs(names: Sequence[str]) -> list[str]:
    """The outputs of a Hugging Face model's head; all outputs if it has none.

    Other outputs come from inner layers or are kept for the next call: hidden states, attentions, caches.
    """
    return [name for name in names if not any(map(_is_state, name.split(".")))] or list(names)


def _is_state(part: str) -> bool:
    return part.endswith(("hidden_state", "hidden_states", "attentions")) or part in (
        "past_key_values",
        "pooler_output",
    )


def _architecture(transformers: Any, names: Any) -> Any:
    """The class that a configuration names; refuses anything but a model class of transformers."""
    name = names[0] if isinstance(names, list) and isinstance(names[0], str) else ""
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise InvalidInput(f"architectures is {names!r}, which names no model of this version of transformers")
    return found
