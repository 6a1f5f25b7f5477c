"""Importance: scores of units."""
