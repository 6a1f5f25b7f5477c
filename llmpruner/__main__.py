"""``python -m llmpruner``."""

import sys

try:
    from .cli import main

    main()
except KeyboardInterrupt:  # before `main` began
    sys.exit(130)
