"""Running the stages of pruning in sequence."""
