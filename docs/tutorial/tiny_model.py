"""Write a tiny random model with a tokenizer: python tiny_model.py MODEL_TYPE DIRECTORY"""

import sys

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

model_type, directory = sys.argv[1:]
config = AutoConfig.for_model(
    model_type,
    vocab_size=258,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)
torch.manual_seed(0)
disable_progress_bar()
AutoModelForCausalLM.from_config(config).save_pretrained(directory)

letters = ByteLevelBPETokenizer()
letters.train_from_iterator([], vocab_size=258, special_tokens=["<s>", "</s>"], show_progress=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters._tokenizer, bos_token="<s>", eos_token="</s>")
tokenizer.save_pretrained(directory)
