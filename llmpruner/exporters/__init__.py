"""Export: writing checkpoints in the formats of other runtimes."""
