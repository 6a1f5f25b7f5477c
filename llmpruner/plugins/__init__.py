"""Hooks, the plugins that implement them, and the catalog of their components."""
