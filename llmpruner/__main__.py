"""``python -m llmpruner``."""

from .cli import main

main()
