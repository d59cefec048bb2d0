"""Transformers with their heads, as they are deployed: a bare one gives out hidden states, which fixes their width."""

from __future__ import annotations

from typing import Any

from torch import nn

from lobo_fx.sources.torchvision_operators import declare_torchvision_operators

declare_torchvision_operators()


def bert_base() -> nn.Module:
    """BERT-base for the classification of sequences."""
    from transformers import BertConfig, BertForSequenceClassification

    model: nn.Module = BertForSequenceClassification(BertConfig())
    return model


def whisper_tiny() -> nn.Module:
    """Whisper-tiny from a spectrogram and tokens to logits."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes: dict[str, Any] = {"d_model": 384, "encoder_layers": 4, "decoder_layers": 4}
    heads: dict[str, Any] = {"encoder_attention_heads": 6, "decoder_attention_heads": 6}
    inner: dict[str, Any] = {"encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536}
    model: nn.Module = WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **inner))
    return model


def whisper_tiny_encoder() -> nn.Module:
    """The encoder of Whisper-tiny, from a spectrogram of 30 seconds."""
    model = whisper_tiny()
    encoder: nn.Module = model.get_encoder()  # type: ignore[operator]
    return encoder


def gpt2() -> nn.Module:
    """GPT-2 (124M parameters) from tokens to logits."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model: nn.Module = GPT2LMHeadModel(GPT2Config(use_cache=False))
    return model
