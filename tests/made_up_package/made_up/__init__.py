"""Importing this package makes model type ``made_up`` known to transformers."""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_made_up import MadeUpConfig
from .modeling_made_up import MadeUpForCausalLM

AutoConfig.register("made_up", MadeUpConfig, exist_ok=True)
AutoModelForCausalLM.register(MadeUpConfig, MadeUpForCausalLM, exist_ok=True)
