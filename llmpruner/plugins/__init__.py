"""Hooks, the plugins that implement them, and the catalog of what they offer."""
