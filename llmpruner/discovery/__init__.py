"""Discovery: the coupled structure of any decoder, found by tracing it without weights."""
