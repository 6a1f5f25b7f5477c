"""Checkpoints on disk: ordinary Hugging Face directories, with or without the shim."""
