"""Export: a checkpoint written for other runtimes."""
