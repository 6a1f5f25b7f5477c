"""The command line: parsing of options, and printing."""

from .app import main as main
