"""Text for calibration, recovery and evaluation."""
