"""ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B and GLM-4, in their original formats and in transformers' own."""

from __future__ import annotations

from llmpruner import hookimpl

from .family import ChatGLM2Family, ChatGLM3Family, ChatGLMFamily, GlmFamily
from .readers import ChatGLM6BReader, ChatGLMReader


@hookimpl
def llmpruner_model_families() -> list[type]:
    return [ChatGLMFamily, GlmFamily, ChatGLM2Family, ChatGLM3Family]


@hookimpl
def llmpruner_checkpoint_readers() -> list[type]:
    return [ChatGLM6BReader, ChatGLMReader]
