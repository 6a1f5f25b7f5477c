from llmpruner_stablelm import StableLmFamily
from transformers import StableLmConfig

from llmpruner.testing import FamilyConformance


class TestStableLm(FamilyConformance):
    family = StableLmFamily

    def config(self):
        return StableLmConfig(
            vocab_size=128,
            hidden_size=48,
            intermediate_size=88,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=1,
        )
