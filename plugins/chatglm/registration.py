"""Registering ChatGLM-6B with transformers' auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .configuration_chatglm import ChatGLMConfig
from .modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel
from .tokenization_chatglm import ChatGLMTokenizer


def register() -> None:
    """Register model type ``chatglm`` with AutoConfig, AutoModel, AutoModelForCausalLM and AutoTokenizer.

    ChatGLM2, ChatGLM3 and GLM-4 in the original format have the same model type; `ChatGLMConfig` refuses their
    configurations. Repeated calls have no further effect.
    """
    AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)
    AutoModel.register(ChatGLMConfig, ChatGLMModel, exist_ok=True)
    AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
    AutoTokenizer.register(ChatGLMConfig, ChatGLMTokenizer, exist_ok=True)
