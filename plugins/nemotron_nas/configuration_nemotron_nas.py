"""The configuration of a model whose layers differ in size, in the format of Nemotron-NAS (``block_configs``).

A copy of this file is in every checkpoint of the exporter ``nemotron-nas``, because transformers has no class for this
model type. It needs nothing but transformers.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class Block(dict):  # type: ignore[type-arg]
    """A JSON object whose entries are attributes too: ``block_configs[3].attention.n_heads_in_group``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class NemotronNasConfig(LlamaConfig):  # type: ignore[misc]
    """LLaMA's configuration with ``block_configs``: for each layer, ``attention.no_op``, ``attention.n_heads_in_group``
    (query heads per key/value head), ``ffn.no_op`` and ``ffn.ffn_mult`` (see `llmpruner_nemotron_nas`)."""

    model_type = "nemotron-nas"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "block_configs":
            value = [Block({part: Block(values) for part, values in block.items()}) for block in value]
        super().__setattr__(name, value)

    def validate_architecture(self) -> None:
        """LLaMA's own check, that heads divide the hidden size, is left out: the size of a head is stated."""
