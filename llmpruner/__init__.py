"""llmpruner: structural pruning of large language models.

The public names stand in ``__init__.pyi``. Each is loaded on first use, so that ``import llmpruner`` is light: no torch
is imported.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
