"""Calibration on counting: 1 2 3 …"""

import torch
from pydantic import Field

from llmpruner import CalibrationSource, ComponentSettings, DataError


class Counting(CalibrationSource):
    name = "counting"
    summary = "numbers one after another, from where the reference says"

    class Settings(ComponentSettings):
        step: int = Field(1, ge=1, description="Difference of neighbours.")

    settings: Settings

    def check(self, reference):
        if reference and not reference.isdigit():
            raise DataError(f"counting:{reference}: expected the number to begin with, such as counting:100")

    def sample(self, task):
        begin, needed = int(task.reference or 1), task.samples * task.length
        numbers = " ".join(str(begin + n * self.settings.step) for n in range(needed))
        ids = task.tokenizer(numbers, add_special_tokens=False)["input_ids"][:needed]
        return torch.tensor(ids).view(task.samples, task.length)
