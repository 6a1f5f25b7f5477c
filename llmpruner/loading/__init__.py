"""Models by reference: a directory, a hub id, a GGUF file, or what a reader adds."""
