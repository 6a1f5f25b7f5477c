"""Compensation: what reads cut units is fitted again, in closed form, so that it says what it said before."""
