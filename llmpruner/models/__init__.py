"""transformers models in memory: built without weights, cut, silenced, copied, run."""
