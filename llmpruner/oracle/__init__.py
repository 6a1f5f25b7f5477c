"""The oracle: on a small random model, cutting units must equal silencing them."""
