"""The one decoder: configuration, model, cache. A family is a set of defaults over it.

Names are loaded when they are first used: transformers imports the configuration while its own modules are half loaded,
and the model must not be imported then.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
