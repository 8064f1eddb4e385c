"""Published families: defaults over the one decoder, and the checkpoint format of flash-linear-attention's GLA.

Names are loaded when they are first used, as in ``models.decoder``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
