"""Recovery: training that restores quality after a cut."""
