"""Linear, softmax and hybrid attention: operators, layers and Hugging Face models.

``__init__.pyi`` lists the public names. Each is imported when it is first used: ``import hybridattn`` alone loads
neither torch nor transformers, and an operator needs torch only.
"""

from importlib import import_module
from typing import Any

import lazy_loader
import wrapt

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def _register_auto_classes(_module: Any) -> None:
    """Register our configurations with AutoConfig; the first one that is constructed registers the model classes.

    transformers has no plug-ins. We wait for its configuration_auto: by the time modeling_auto is loaded, importing
    model code runs into transformers' own circular imports.
    """
    import_module("hybridattn.models.families.registration")


wrapt.when_imported("transformers.models.auto.configuration_auto")(_register_auto_classes)


def _register_attention(_module: Any) -> None:
    """Register ``attn_implementation="hybridattn"``, once transformers' attention interface exists."""
    import_module("hybridattn.models.attention")


wrapt.when_imported("transformers.modeling_utils")(_register_attention)
