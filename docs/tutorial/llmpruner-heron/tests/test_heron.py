import json

import numpy
import pytest
import torch
from llmpruner_heron import HeronFamily, HeronReader
from llmpruner_heron.modeling_heron import HeronConfig, HeronForCausalLM
from llmpruner_heron.reader import stored_name

from llmpruner import CheckpointError
from llmpruner.testing import FamilyConformance


class TestHeron(FamilyConformance):
    family = HeronFamily

    def config(self):
        HeronFamily().register_models()
        return HeronConfig(vocab_size=128, hidden_size=48, inner_size=88, num_hidden_layers=2, num_attention_heads=6)


@pytest.fixture
def stored(tmp_path):
    """A folder in Heron's format, and the model that is in it."""
    model = HeronForCausalLM(HeronConfig(vocab_size=128, hidden_size=48, inner_size=88, num_attention_heads=6))
    arrays = {stored_name(n): p.detach().numpy() for n, p in model.named_parameters()}
    numpy.savez(tmp_path / "heron.npz", **arrays)
    sizes = {"vocabulary": 128, "width": 48, "inner": 88, "depth": 4, "heads": 6}
    (tmp_path / "heron.json").write_text(json.dumps(sizes))
    return tmp_path, model


def test_the_reader_gives_the_model_that_was_stored(stored):
    path, model = stored
    assert HeronReader().recognises(path)
    read = HeronReader().read_model(path, None).state_dict()
    assert all(torch.equal(read[name], value) for name, value in model.state_dict().items())


def test_a_missing_array_is_named(stored):
    path, _ = stored
    sizes = json.loads((path / "heron.json").read_text())
    (path / "heron.json").write_text(json.dumps({**sizes, "depth": 5}))
    with pytest.raises(CheckpointError, match=r"has no array '4.norm_1' of shape \(48,\)"):
        HeronReader().read_model(path, None)


def test_the_prompt():
    assert HeronFamily.chat_format.format_prompt("Add them.") == "<visitor> Add them.\n<heron> "
