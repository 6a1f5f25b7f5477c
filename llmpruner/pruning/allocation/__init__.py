"""Selection: from scores and an amount to the units to keep."""
