"""``params.json``: the configuration of Meta's official format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError
from transformers import LlamaConfig

from llmpruner import CheckpointError, UnsupportedModelError

_SCALED_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The constants of ``use_scaled_rope`` in Meta's code."""
META_FACTOR = 8.0
"""The factor of ``use_scaled_rope`` in Meta's code, where it is a constant too."""


def scaled_rope_factor(dim: int) -> float:
    """The factor of ``use_scaled_rope`` in the published configurations, as ``params.json`` of the releases has none:
    32 for Llama 3.2 (1B and 3B, with dim 2048 and 3072), 8 for Llama 3.1 and 3.3 (from dim 4096)."""
    return 32.0 if dim <= 3072 else META_FACTOR


def ffn_width(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """The width of the MLP as ``FeedForward`` in Meta's ``model.py`` computes it."""
    width = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


class MetaParams(BaseModel):
    """The fields that decide the model. ``vocab_size`` −1: as many as the embedding has rows."""

    model_config = ConfigDict(frozen=True, strict=True)

    dim: PositiveInt
    n_layers: PositiveInt
    n_heads: PositiveInt
    n_kv_heads: PositiveInt
    multiple_of: PositiveInt = 256
    ffn_dim_multiplier: PositiveFloat | None = None
    norm_eps: PositiveFloat = 1e-5
    vocab_size: int = -1
    rope_theta: PositiveFloat = 10000.0
    rope_scaling_factor: PositiveFloat | None = None
    """None: rotary frequencies are not scaled."""
    max_seq_len: PositiveInt | None = None

    @classmethod
    def read(cls, path: Path) -> MetaParams:
        """Raises `CheckpointError` when a field is missing or invalid."""
        try:
            stated = json.loads(path.read_text(encoding="utf-8"))
            values = {name: value for name, value in stated.items() if value is not None}
            params = cls.model_validate({"n_kv_heads": values.get("n_heads"), **values})
        except ValidationError as error:
            first = error.errors()[0]
            raise CheckpointError(f"{path}: {first['loc'][0]} is {first['input']!r}: {first['msg']}") from error
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({str(error).splitlines()[0]}): download it again") from error
        if params.dim % (2 * params.n_heads) or params.n_heads % params.n_kv_heads:
            raise CheckpointError(
                f"{path}: dim {params.dim}, n_heads {params.n_heads}, n_kv_heads {params.n_kv_heads} do not fit"
            )
        factor = params.rope_scaling_factor or scaled_rope_factor(params.dim)
        return params.model_copy(update={"rope_scaling_factor": factor if values.get("use_scaled_rope") else None})

    @classmethod
    def of(cls, config: LlamaConfig, *, width: int, vocabulary: int) -> MetaParams:
        """For a model of ``config`` whose MLPs all have the width ``width``. ``vocabulary``: rows of the embedding.

        Any width can be represented: with ``multiple_of`` 1, Meta's formula is int(m · int(8·dim/3)), and
        m = (width + ½) / int(8·dim/3) solves it. Raises `UnsupportedModelError` for other rotary scaling than Meta's.
        """
        dim = config.hidden_size
        multiple_of, multiplier = 256, None
        if ffn_width(dim, multiple_of, multiplier) != width:
            multiple_of, multiplier = 1, (width + 0.5) / ffn_width(dim, 1, None)
            if ffn_width(dim, multiple_of, multiplier) != width:
                raise UnsupportedModelError(f"Meta's format cannot express an MLP of width {width} with dim {dim}")
        rope = dict(config.rope_parameters)
        kind, theta = rope.pop("rope_type", "default"), float(rope.pop("rope_theta", 10000.0))
        factor = None
        if kind == "llama3" and {k: rope.get(k) for k in _SCALED_ROPE} == _SCALED_ROPE:
            factor = float(rope["factor"])
        elif kind != "default":
            raise UnsupportedModelError(f"Meta's format cannot express rotary scaling of type '{kind}' with {rope}")
        return cls(
            dim=dim,
            n_layers=config.num_hidden_layers,
            n_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
            multiple_of=multiple_of,
            ffn_dim_multiplier=multiplier,
            norm_eps=config.rms_norm_eps,
            vocab_size=vocabulary,
            rope_theta=theta,
            rope_scaling_factor=factor,
        )

    def to_json(self) -> dict[str, Any]:
        """The fields for ``params.json``, without those at their default: Meta's older code refuses them. Its later
        code ignores those that it does not know: ``rope_scaling_factor`` is for `read` alone."""
        values: dict[str, Any] = {"dim": self.dim, "n_layers": self.n_layers, "n_heads": self.n_heads}
        if self.n_kv_heads != self.n_heads:
            values["n_kv_heads"] = self.n_kv_heads
        values |= {"vocab_size": self.vocab_size, "multiple_of": self.multiple_of}
        if self.ffn_dim_multiplier is not None:
            values["ffn_dim_multiplier"] = self.ffn_dim_multiplier
        values["norm_eps"] = self.norm_eps
        if self.rope_theta != 10000.0:
            values["rope_theta"] = self.rope_theta
        if self.rope_scaling_factor is not None:
            values["use_scaled_rope"] = True
            if self.rope_scaling_factor != scaled_rope_factor(self.dim):
                values["rope_scaling_factor"] = self.rope_scaling_factor
        return values

    @property
    def ffn_width(self) -> int:
        return ffn_width(self.dim, self.multiple_of, self.ffn_dim_multiplier)

    @property
    def max_positions(self) -> int:
        """The trained context, which the format does not store, from the fields that identify each release."""
        if self.max_seq_len is not None:
            return self.max_seq_len
        if self.rope_scaling_factor is not None:
            return 131072  # Llama 3.1 and later
        if self.rope_theta >= 1_000_000:
            return 16384  # Code Llama
        if self.rope_theta > 10_000:
            return 8192  # Llama 3
        return 2048 if self.norm_eps < 1e-5 else 4096  # Llama 1, Llama 2

    def to_config(self, vocabulary: int, *, tied: bool, bos: int, eos: int, dtype: Any) -> LlamaConfig:
        """The configuration in transformers; ``vocabulary``: rows of the embedding."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_scaling_factor is not None:
            rope |= {"rope_type": "llama3", "factor": self.rope_scaling_factor, **_SCALED_ROPE}
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.dim,
            intermediate_size=self.ffn_width,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_kv_heads,
            max_position_embeddings=self.max_positions,
            rms_norm_eps=self.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=tied,
            bos_token_id=bos,
            eos_token_id=eos,
            dtype=dtype,
            architectures=["LlamaForCausalLM"],
        )
