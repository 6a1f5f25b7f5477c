"""The stages of a prune strung together."""
