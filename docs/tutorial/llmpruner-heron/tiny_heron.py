"""Write a tiny random Heron in its own format: python tiny_heron.py DIRECTORY"""

import json
import sys
from pathlib import Path

import numpy
import torch
from llmpruner_heron.modeling_heron import HeronConfig, HeronForCausalLM
from llmpruner_heron.reader import stored_name
from tokenizers import ByteLevelBPETokenizer

directory = Path(sys.argv[1])
directory.mkdir()
torch.manual_seed(0)
config = HeronConfig()
model = HeronForCausalLM(config)
numpy.savez(directory / "heron.npz", **{stored_name(n): p.detach().numpy() for n, p in model.named_parameters()})
sizes = {
    "vocabulary": config.vocab_size,
    "width": config.hidden_size,
    "inner": config.inner_size,
    "depth": config.num_hidden_layers,
    "heads": config.num_attention_heads,
}
(directory / "heron.json").write_text(json.dumps(sizes))
letters = ByteLevelBPETokenizer()
letters.train_from_iterator([], vocab_size=258, special_tokens=["<s>", "</s>"], show_progress=False)
letters.save(str(directory / "tokenizer.json"))
