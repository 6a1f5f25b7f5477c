"""The oracle: checks on a small random model that cutting units equals silencing them."""
