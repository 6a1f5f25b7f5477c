"""All tensors in one file of half precision."""

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file

from llmpruner import ComponentSettings, Exporter, ModelError


class OneFile(Exporter):
    name = "one-file"
    summary = "every tensor in float16 in one safetensors file"

    class Settings(ComponentSettings):
        file: str = Field("weights.safetensors", description="Name of the file.")

    settings: Settings

    def export(self, task):
        tensors = {name: p.detach().to(torch.float16).contiguous() for name, p in task.model.named_parameters()}
        path = task.directory / self.settings.file
        save_file(tensors, path)
        again = load_file(path)
        if any(not torch.equal(again[name], tensor) for name, tensor in tensors.items()):
            raise ModelError(f"{path} does not hold what was written")
        return f"{len(tensors)} tensors; load them with safetensors.torch.load_file"
