"""Methods: named sets of settings for a prune."""
