"""Making ``import flash_attn`` mean this package, for code that cannot be changed."""

from __future__ import annotations

import sys
import types

#: The release of ``flash_attn`` whose functions these are.
FLASH_ATTN_VERSION = "2.8.3"


def install_as_flash_attn() -> types.ModuleType:
    """Makes ``import flash_attn`` resolve to this package in this process.

    ``flash_attn``, ``flash_attn.flash_attn_interface`` and ``flash_attn.bert_padding`` are there afterwards. Call it
    before the code that imports them.

    Returns
    -------
    module
        What ``import flash_attn`` gives.

    Raises
    ------
    RuntimeError
        If another ``flash_attn`` has been imported already.
    """
    from . import flash_attn_interface

    known = sys.modules.get("flash_attn")
    if known is not None:
        if getattr(known, "__flashattn__", False):
            return known
        raise RuntimeError(f"flash_attn has been imported already, from {getattr(known, '__file__', '?')}")
    module = types.ModuleType("flash_attn", "flash_attn, by the package flashattn")
    module.__flashattn__ = True  # type: ignore[attr-defined]
    module.__version__ = FLASH_ATTN_VERSION  # type: ignore[attr-defined]
    module.__path__ = []  # type: ignore[attr-defined]
    for name in flash_attn_interface.__all__:
        setattr(module, name, getattr(flash_attn_interface, name))
    module.flash_attn_interface = flash_attn_interface  # type: ignore[attr-defined]
    sys.modules["flash_attn"] = module
    sys.modules["flash_attn.flash_attn_interface"] = flash_attn_interface
    try:
        from . import bert_padding
    except ModuleNotFoundError:
        return module  # without PyTorch there is nothing that could use it
    module.bert_padding = bert_padding  # type: ignore[attr-defined]
    sys.modules["flash_attn.bert_padding"] = bert_padding
    return module
