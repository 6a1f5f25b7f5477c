"""How often the likeliest token is the right one."""

import torch
from pydantic import Field

from llmpruner import ComponentSettings, Metric, Row, read_text


class Accuracy(Metric):
    name = "accuracy"
    summary = "share of tokens that the model predicts first"

    class Settings(ComponentSettings):
        text: str = Field("pydoc", description="Text file, data set, or 'pydoc'.")
        tokens: int = Field(64, ge=2, description="Tokens of the text to use.")

    settings: Settings

    def prepare(self):
        self._text = read_text(self.settings.text)

    @torch.inference_mode()
    def measure(self, subject):
        ids = subject.tokenizer(self._text, add_special_tokens=False)["input_ids"][: self.settings.tokens]
        tokens = torch.tensor([ids], device=subject.model.device)
        first = subject.model(input_ids=tokens, use_cache=False).logits[0, :-1].argmax(-1)
        return {"accuracy": float((first == tokens[0, 1:]).float().mean()), "tokens": len(ids)}

    def rows(self, result):
        return [Row("next-token accuracy", result["accuracy"], higher_is_better=True)]
