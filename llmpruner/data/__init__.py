"""Text and instruction data: read from files and data sets for calibration, recovery and evaluation."""
