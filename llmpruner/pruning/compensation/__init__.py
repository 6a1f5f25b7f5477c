"""Compensation: adapting the weights that read removed units, in closed form."""
