"""Loading models by reference: a directory, a hub id, a GGUF file, or the format of a checkpoint reader."""
