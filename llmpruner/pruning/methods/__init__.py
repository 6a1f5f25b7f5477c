"""Methods: named sets of settings for pruning."""
