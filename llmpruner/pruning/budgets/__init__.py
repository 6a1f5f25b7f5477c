"""Budgets: the costs of a model that the amount to remove can be a share of."""
