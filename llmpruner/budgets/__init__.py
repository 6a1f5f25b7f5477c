"""Budgets: what the amount to remove is a share of."""
