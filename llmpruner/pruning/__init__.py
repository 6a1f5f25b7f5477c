"""From scores to a smaller model: criteria, budgets, allocation, compensation."""
