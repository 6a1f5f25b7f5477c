"""Slow measurements. ``make bench`` runs those that need no more than the real model and the shared data."""
