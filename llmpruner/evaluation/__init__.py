"""Evaluation: size, perplexity, lm-eval tasks, speed, and the metrics of plugins."""
