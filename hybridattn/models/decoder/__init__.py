"""The decoder that all models of this package share: configuration, model classes, loss and cache.

Names are loaded at first use: transformers imports the configuration while its own modules are partly loaded, and the
model cannot be imported at that time.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
