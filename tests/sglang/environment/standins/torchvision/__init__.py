"""torchvision comes without a build for this torch. It is imported where images are handled; text models need
no more than its names.
"""

from __future__ import annotations

import enum
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.28.0"


class InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def _named(name: str) -> type:
    """An empty class for any name but those that Python itself asks modules for."""
    if name.startswith("__"):
        raise AttributeError(name)
    return InterpolationMode if name == "InterpolationMode" else type(name, (), {})


for _path in ("io", "transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional"):
    _module = ModuleType(f"{__name__}.{_path}")
    _module.__spec__ = ModuleSpec(_module.__name__, None, is_package=True)
    _module.__path__ = []
    _module.__getattr__ = _named  # type: ignore[method-assign]
    sys.modules[_module.__name__] = _module
    _parent, _, _last = _module.__name__.rpartition(".")
    setattr(sys.modules[_parent], _last, _module)
