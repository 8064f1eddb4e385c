"""Model families GLA, DeltaNet, Gated DeltaNet, KDA, BASED and JRT: configurations and their model classes.

Names are loaded at first use, as in ``models.decoder``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
