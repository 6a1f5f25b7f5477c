"""Telling transformers' Auto classes about ChatGLM-6B."""

from __future__ import annotations


def register() -> None:
    """Register model type ``chatglm`` with AutoConfig, AutoModel, AutoModelForCausalLM and AutoTokenizer.

    ChatGLM2, ChatGLM3 and GLM-4 in the original format share that model type; their configurations are refused with a
    message that says so. Safe to call more than once.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    from .configuration_chatglm import ChatGLMConfig
    from .modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel
    from .tokenization_chatglm import ChatGLMTokenizer

    AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)
    AutoModel.register(ChatGLMConfig, ChatGLMModel, exist_ok=True)
    AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
    AutoTokenizer.register(ChatGLMConfig, ChatGLMTokenizer, exist_ok=True)
