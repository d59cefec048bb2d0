"""Small random Hugging Face models with a task head, one a family: nothing is downloaded.

Sizes differ from one another wherever a configuration allows, so that no two axes match by coincidence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lobo_fx.graph.inputs import Inputs
from lobo_fx.sources.torchvision_operators import declare_torchvision_operators

TOKENS, VOCABULARY = 14, 101


@dataclasses.dataclass(frozen=True)
class Tiny:
    """How to build one model.

    Attributes:
        architecture: class name in `transformers`.
        config: settings of its configuration, nested ones as dicts.
        inputs: makes the keyword inputs of two rows.
        output: which of its outputs is the task's; the others (hidden states, states kept for later) are left out.
    """

    architecture: str
    config: Mapping[str, Any]
    inputs: Callable[[torch.Generator], dict[str, torch.Tensor]]
    output: str = "logits"


class Task(nn.Module):
    """A model that takes tensors by position and gives one output."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], output: str) -> None:
        super().__init__()
        self.model, self.names, self.output = model, names, output

    def forward(self, first: torch.Tensor, second: torch.Tensor | None = None) -> torch.Tensor:
        given = dict(zip(self.names, (first, second), strict=False))
        result: torch.Tensor = getattr(self.model(**given), self.output)
        return result


def build_tiny(name: str) -> tuple[nn.Module, Inputs]:
    """Builds the model of that name with its inputs, from torch's global seed."""
    declare_torchvision_operators()
    import transformers

    tiny = TINY[name]
    architecture = getattr(transformers, tiny.architecture)
    config = architecture.config_class(**tiny.config)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # past keys and values are no part of one call
    inputs = tiny.inputs(torch.Generator().manual_seed(0))
    model = architecture(config)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # the default is an operator that has no ONNX form
    return Task(model, tuple(inputs), tiny.output), Inputs(tuple(inputs.values()))


def _tokens(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, TOKENS), generator=generator)


def _text(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_ids": _tokens(generator), "attention_mask": torch.ones(2, TOKENS, dtype=torch.long)}


def _translation(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_ids": _tokens(generator), "decoder_input_ids": _tokens(generator)}


def _image(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 64, 64, generator=generator)}


def _image_and_text(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_ids": _tokens(generator)} | _image(generator)


def _wave(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(2, 4000, generator=generator)}


def _spectrogram(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(2, 20, 60, generator=generator), "decoder_input_ids": _tokens(generator)}


def _patches_of_sound(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(2, 60, 32, generator=generator)}


_WORDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WIDTHS = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 88}
_ENCODER = _WORDS | _WIDTHS | {"max_position_embeddings": 40, "num_labels": 5}
_DECODER = _WORDS | _WIDTHS | {"max_position_embeddings": 40}
_GROUPED = _DECODER | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
_BART = _WORDS | {
    "d_model": 48,
    **{"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"encoder_ffn_dim": 88, "decoder_ffn_dim": 72, "max_position_embeddings": 40, "decoder_start_token_id": 2},
}
_T5 = _WORDS | {
    **{"d_model": 48, "d_kv": 10, "d_ff": 88, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
    **{"decoder_start_token_id": 0},
}
_VISION = _WIDTHS | {"image_size": 64, "patch_size": 16, "num_labels": 5}
_STAGES = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 3], "window_size": 4, "patch_size": 4}
_SWIN = _STAGES | {"image_size": 64, "num_labels": 5}
_SPEECH = _WIDTHS | {
    **{"vocab_size": 33, "num_labels": 5, "conv_dim": (20, 24, 28), "conv_kernel": (10, 3, 3)},
    **{"conv_stride": (5, 2, 2), "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16},
    **{"num_conv_pos_embedding_groups": 4, "classifier_proj_size": 20, "mask_time_prob": 0.0},
}
_TWO_TOWERS = {
    "text_config": _WORDS | _WIDTHS | {"max_position_embeddings": 40},
    "vision_config": _WIDTHS | {"hidden_size": 60, "image_size": 64, "patch_size": 16},
    "projection_dim": 36,
}
_SAME_TOWERS = _TWO_TOWERS | {"vision_config": _WIDTHS | {"image_size": 64, "patch_size": 16}}
_DINO = _WIDTHS | {"image_size": 64, "patch_size": 16, "num_labels": 5, "mlp_ratio": 2}

# ViLT is not here: its patches depend on the values of a mask, which `torch.export` can not capture.
TINY: dict[str, Tiny] = {
    "bert": Tiny("BertForSequenceClassification", _ENCODER, _text),
    "roberta": Tiny("RobertaForSequenceClassification", _ENCODER, _text),
    "distilbert": Tiny(
        "DistilBertForSequenceClassification",
        {"vocab_size": VOCABULARY, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 88, "num_labels": 5},
        _text,
    ),
    "albert": Tiny("AlbertForSequenceClassification", _ENCODER | {"embedding_size": 20}, _text),
    "electra": Tiny("ElectraForSequenceClassification", _ENCODER | {"embedding_size": 20}, _text),
    "deberta-v2": Tiny(
        "DebertaV2ForSequenceClassification",
        _ENCODER
        | {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
        },
        _text,
    ),
    "mpnet": Tiny("MPNetForSequenceClassification", _ENCODER, _text),
    "funnel": Tiny(
        "FunnelForSequenceClassification",
        _WORDS | {"d_model": 48, "n_head": 4, "d_head": 12, "d_inner": 88, "block_sizes": [1, 1], "num_labels": 5},
        _text,
    ),
    "modernbert": Tiny("ModernBertForSequenceClassification", _ENCODER | {"cls_token_id": 1, "sep_token_id": 2}, _text),
    "gpt2": Tiny("GPT2LMHeadModel", _WORDS | {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 40}, _text),
    "gpt-neo": Tiny(
        "GPTNeoForCausalLM",
        _WORDS
        | {"hidden_size": 48, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
        | {"max_position_embeddings": 40, "window_size": 6},
        _text,
    ),
    "gpt-neox": Tiny("GPTNeoXForCausalLM", _DECODER, _text),
    "gptj": Tiny(
        "GPTJForCausalLM", _WORDS | {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 40, "rotary_dim": 8}, _text
    ),
    "opt": Tiny("OPTForCausalLM", _DECODER | {"ffn_dim": 88, "word_embed_proj_dim": 48}, _text),
    "bloom": Tiny("BloomForCausalLM", _WORDS | {"hidden_size": 48, "n_layer": 2, "n_head": 4}, _text),
    "llama": Tiny("LlamaForCausalLM", _GROUPED, _text),
    "mistral": Tiny("MistralForCausalLM", _GROUPED | {"sliding_window": 6}, _text),
    "qwen2": Tiny("Qwen2ForCausalLM", _DECODER | {"num_key_value_heads": 2}, _text),
    "qwen3": Tiny("Qwen3ForCausalLM", _GROUPED, _text),
    "gemma": Tiny("GemmaForCausalLM", _GROUPED, _text),
    "gemma2": Tiny("Gemma2ForCausalLM", _GROUPED | {"sliding_window": 6}, _text),
    "phi": Tiny("PhiForCausalLM", _DECODER | {"num_key_value_heads": 4}, _text),
    "phi3": Tiny("Phi3ForCausalLM", _DECODER | {"num_key_value_heads": 2}, _text),
    "falcon": Tiny("FalconForCausalLM", _DECODER | {"multi_query": True, "new_decoder_architecture": False}, _text),
    "stablelm": Tiny("StableLmForCausalLM", _DECODER | {"num_key_value_heads": 2, "partial_rotary_factor": 0.5}, _text),
    "olmo2": Tiny("Olmo2ForCausalLM", _DECODER | {"num_key_value_heads": 2}, _text),
    "cohere": Tiny("CohereForCausalLM", _DECODER | {"num_key_value_heads": 2}, _text),
    "mamba": Tiny(
        "MambaForCausalLM",
        _WORDS | {"hidden_size": 48, "state_size": 6, "num_hidden_layers": 2, "conv_kernel": 4, "time_step_rank": 5},
        _text,
    ),
    "mixtral": Tiny("MixtralForCausalLM", _GROUPED | {"num_local_experts": 3, "num_experts_per_tok": 2}, _text),
    "t5": Tiny("T5ForConditionalGeneration", _T5, _translation),
    "flan-t5": Tiny("T5ForConditionalGeneration", _T5 | {"feed_forward_proj": "gated-gelu"}, _translation),
    "bart": Tiny("BartForConditionalGeneration", _BART, _translation),
    "mbart": Tiny("MBartForConditionalGeneration", _BART, _translation),
    "marian": Tiny("MarianMTModel", _BART | {"decoder_vocab_size": VOCABULARY}, _translation),
    "pegasus": Tiny("PegasusForConditionalGeneration", _BART, _translation),
    "whisper": Tiny(
        "WhisperForConditionalGeneration",
        _BART | {"num_mel_bins": 20, "max_source_positions": 30, "max_target_positions": 40},
        _spectrogram,
    ),
    "wav2vec2": Tiny("Wav2Vec2ForSequenceClassification", _SPEECH, _wave),
    "wav2vec2-ctc": Tiny(
        "Wav2Vec2ForCTC", _SPEECH | {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}, _wave
    ),
    "hubert": Tiny("HubertForSequenceClassification", _SPEECH, _wave),
    "audio-spectrogram": Tiny(
        "ASTForAudioClassification",
        _WIDTHS | {"patch_size": 8, "num_mel_bins": 32, "max_length": 60, "num_labels": 5},
        _patches_of_sound,
    ),
    "vit": Tiny("ViTForImageClassification", _VISION, _image),
    "deit": Tiny("DeiTForImageClassification", _VISION, _image),
    "beit": Tiny("BeitForImageClassification", _VISION | {"use_relative_position_bias": True}, _image),
    "dinov2": Tiny("Dinov2ForImageClassification", _DINO, _image),
    "dinov2-registers": Tiny("Dinov2WithRegistersForImageClassification", _DINO, _image),
    "swin": Tiny("SwinForImageClassification", _SWIN, _image),
    "swinv2": Tiny("Swinv2ForImageClassification", _SWIN, _image),
    "convnext": Tiny(
        "ConvNextForImageClassification",
        {"hidden_sizes": [12, 20, 28, 36], "depths": [1, 1, 2, 1], "num_labels": 5},
        _image,
    ),
    "convnextv2": Tiny(
        "ConvNextV2ForImageClassification",
        {"hidden_sizes": [12, 20, 28, 36], "depths": [1, 1, 2, 1], "num_labels": 5},
        _image,
    ),
    "resnet": Tiny(
        "ResNetForImageClassification",
        {"embedding_size": 12, "hidden_sizes": [20, 28], "depths": [2, 2], "num_labels": 5},
        _image,
    ),
    "regnet": Tiny(
        "RegNetForImageClassification",
        {"embedding_size": 12, "hidden_sizes": [24, 32], "depths": [2, 2], "groups_width": 8, "num_labels": 5},
        _image,
    ),
    "mobilenet-v2": Tiny("MobileNetV2ForImageClassification", {"image_size": 64, "num_labels": 5}, _image),
    "mobilevit": Tiny(
        "MobileViTForImageClassification",
        {
            "image_size": 64,
            "initializer_range": 0.2,
            "hidden_sizes": [24, 32, 40],
            "neck_hidden_sizes": [8, 12, 16, 20, 28, 36, 44],
        }
        | {"num_attention_heads": 4, "num_labels": 5},
        _image,
    ),
    "segformer": Tiny(
        "SegformerForSemanticSegmentation",
        {"hidden_sizes": [12, 20, 28, 36], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]}
        | {"decoder_hidden_size": 24, "num_labels": 5},
        _image,
    ),
    "pvt": Tiny(
        "PvtForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [12, 20, 28, 36],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
        }
        | {"num_labels": 5},
        _image,
    ),
    "poolformer": Tiny(
        "PoolFormerForImageClassification",
        {"hidden_sizes": [12, 20, 28, 36], "depths": [1, 1, 1, 1], "num_labels": 5},
        _image,
    ),
    "levit": Tiny(
        "LevitForImageClassification",
        {"image_size": 64, "hidden_sizes": [24, 32, 40], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1]}
        | {"key_dim": [6, 6, 6], "num_labels": 5},
        _image,
    ),
    "yolos": Tiny(
        "YolosForObjectDetection",
        _VISION | {"initializer_range": 0.1, "image_size": [64, 64], "num_detection_tokens": 7},
        _image,
    ),
    "clip": Tiny("CLIPModel", _TWO_TOWERS, _image_and_text, "logits_per_image"),
    "siglip": Tiny("SiglipModel", _SAME_TOWERS, _image_and_text, "logits_per_image"),
    "blip": Tiny(
        "BlipForImageTextRetrieval", _TWO_TOWERS | {"image_text_hidden_size": 36}, _image_and_text, "itm_score"
    ),
    "git": Tiny(
        "GitForCausalLM",
        _DECODER | {"vision_config": {**_WIDTHS, "hidden_size": 60, "image_size": 64, "patch_size": 16}},
        _image_and_text,
    ),
    "dpt": Tiny(
        "DPTForDepthEstimation",
        _VISION
        | {
            "num_hidden_layers": 4,
            "initializer_range": 0.1,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [12, 20, 28, 36],
            "fusion_hidden_size": 24,
        },
        _image,
        "predicted_depth",
    ),
}
