"""LLaMA exported to Meta's format: streamed, read back, and removed when it cannot be done."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llmpruner_llama
import pytest
import torch
from llama_cases import DATA, TOKENIZER, copy_of, logits, read, set_param, tokens_of
from llmpruner_llama import MetaExporter, MetaReader
from llmpruner_llama.meta_format import to_rotate_half

from llmpruner import CheckpointError, UnsupportedModelError, build_graph, exporters, load_pruned, save_checkpoint
from llmpruner.errors import SettingsError
from llmpruner.models.surgery import cut


def export(source: Path, output: Path, **settings: Any) -> str:
    def load() -> Any:
        return SimpleNamespace(model=load_pruned(source), tokenizer=None, record=None)

    return exporters.export(source, MetaExporter(**settings), output, load)


def checkpoint(folder: Path, name: str, kept: dict[str, Any]) -> Any:
    """The golden model, cut and saved in Hugging Face's format."""
    model = read(DATA / name / "1shard")
    family = llmpruner_llama.LlamaFamily()
    cut(model, build_graph(family, model.config), kept, family)
    save_checkpoint(model, folder, record={}, family=family)
    return model


@pytest.fixture
def pruned(tmp_path: Path) -> tuple[Path, Any]:
    """Both MLPs at 130 of 224 channels."""
    model = checkpoint(tmp_path / "pruned", "gqa", {f"layers.{n}.mlp": range(130) for n in range(2)})
    return tmp_path / "pruned", model


def test_what_is_read_back_is_the_pruned_model(pruned: tuple[Path, Any], tmp_path: Path) -> None:
    source, model = pruned
    line = export(source, tmp_path / "meta", shards=2)
    assert "model-parallel size 2" in line and "without tokenizer.model" in line
    names = {"consolidated.00.pth", "consolidated.01.pth", "params.json"}
    assert {file.name for file in (tmp_path / "meta").iterdir()} == names
    assert torch.equal(logits(read(tmp_path / "meta"), tokens_of("gqa")), logits(model, tokens_of("gqa")))


def test_a_vocabulary_that_lost_tokens_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    source = tmp_path / "pruned"
    source.mkdir()
    (source / "llmpruner.json").write_text('{"plans": [{"cuts": {"vocabulary": {}}}]}')
    with pytest.raises(UnsupportedModelError, match="tokens were removed"):
        exporters.export(source, MetaExporter(), tmp_path / "meta", lambda: pytest.fail("loaded"))
    assert not (tmp_path / "meta").exists()


@pytest.mark.parametrize("factor", [None, 8.0, 32.0])
def test_another_rotary_factor_than_that_of_metas_code_is_said(factor: float | None, tmp_path: Path) -> None:
    folder = copy_of("gqa", "1shard", tmp_path / "source")
    if factor is not None:
        set_param(folder, rope_theta=500000.0, use_scaled_rope=True, rope_scaling_factor=factor)
    save_checkpoint(read(folder), tmp_path / "hf", record={}, family=llmpruner_llama.LlamaFamily())
    line = export(tmp_path / "hf", tmp_path / "meta")
    assert ("its rotary factor is 32, and Meta's code takes 8" in line) == (factor == 32.0)
    if factor is not None:
        assert MetaReader().read_config(tmp_path / "meta").rope_parameters["factor"] == factor


def test_the_tokenizer_comes_from_the_source_or_from_the_folder_given(pruned: tuple[Path, Any], tmp_path: Path) -> None:
    source, _ = pruned
    export(source, tmp_path / "named", tokenizer=TOKENIZER)
    (source / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    line = export(source, tmp_path / "own")
    assert "without" not in line
    for folder in ("named", "own"):
        assert len(MetaReader().read_tokenizer(tmp_path / folder)) == 84
    with pytest.raises(SettingsError, match=r"exporter meta: tokenizer .*nowhere"):
        MetaExporter(tokenizer=tmp_path / "nowhere")


def test_a_wrong_order_of_rotary_dimensions_is_noticed(
    pruned: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmpruner_llama import meta_format

    monkeypatch.setattr(meta_format, "to_neighbours", to_rotate_half)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is read back with other values"):
        export(pruned[0], tmp_path / "meta")
    assert not (tmp_path / "meta").exists()
