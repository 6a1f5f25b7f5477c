"""Conversations with models: streamed answers, in the terminal or on a local page."""
