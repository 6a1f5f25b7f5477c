"""A runtime that keeps no keys and values: every step processes all tokens again."""

import torch

from llmpruner import Runtime, Session, Work


class WithoutCache(Runtime):
    name = "without-cache"
    summary = "transformers, which processes all tokens again in every step"

    def open(self, subject):
        weights = subject.structure.graph.decoder_parameters
        return WholeTexts(subject.load().model), Work(weights, 0, 0, weights, cache_bytes=0)


class WholeTexts(Session):
    def __init__(self, model):
        self.model, self.dtype, self.vocabulary = model, str(model.dtype), model.config.vocab_size

    def prefill(self, tokens):
        self.tokens = tokens
        with torch.inference_mode():
            self.next = self.model(tokens, use_cache=False).logits[:, -1:].argmax(-1)

    def decode(self, count):
        for _ in range(count):
            self.prefill(torch.cat([self.tokens, self.next], 1))
