"""llmpruner: structural pruning of large language models.

``__init__.pyi`` lists the public names. Each is loaded on first use, so that ``import llmpruner`` imports no torch.
"""

import lazy_loader

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
