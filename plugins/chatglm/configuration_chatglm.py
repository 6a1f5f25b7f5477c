"""Configuration of ChatGLM-6B. Imports transformers alone: it is copied into checkpoints as their own code."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig


class ChatGLMConfig(PreTrainedConfig):
    """Reads the released ``config.json`` as it is. ``head_dim`` is added, so that heads can be fewer than
    ``hidden_size / head_dim``. Raises `ValueError` for what the model class does not implement."""

    model_type = "chatglm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    head_dim: int | None = None
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 130004
    eos_token_id: int | list[int] | None = 130005
    pad_token_id: int | None = 3
    mask_token_id: int | None = None
    gmask_token_id: int | None = None
    quantization_bit: int = 0
    pre_seq_len: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if "multi_query_group_num" in kwargs:
            raise ValueError(
                "this is a ChatGLM2, ChatGLM3 or GLM-4 checkpoint in the original format, not ChatGLM-6B; "
                "convert it to GLM first (llmpruner does so when it loads it)"
            )
        if self.quantization_bit:
            raise ValueError(f"this checkpoint is quantized to {self.quantization_bit} bits; use the 16-bit release")
        if self.pre_seq_len:
            raise ValueError("this checkpoint carries a P-tuning prefix (pre_seq_len), which is not supported")
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.bos_token_id is not None:
            # Old releases leave these ids out.
            self.mask_token_id = self.bos_token_id - 4 if self.mask_token_id is None else self.mask_token_id
            self.gmask_token_id = self.bos_token_id - 3 if self.gmask_token_id is None else self.gmask_token_id
        super().__post_init__(**kwargs)


ChatGLMConfig.register_for_auto_class()
