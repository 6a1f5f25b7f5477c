"""Compensation: weights that read removed units are fitted again, in closed form."""
