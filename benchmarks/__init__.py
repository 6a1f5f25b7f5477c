"""Slow measurements; ``make bench`` runs `benchmarks.quality`."""
