"""GGUF files of llama.cpp: which architectures can state a model, writing, reading back, running."""
