"""Discovery: finding the coupled groups of any decoder by tracing it without weights."""
