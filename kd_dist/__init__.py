"""kd_dist: offline knowledge distillation on many GPUs, two jobs and one HDF5 file of soft labels between them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kd_dist.version import __version__

if TYPE_CHECKING:
    from kd_dist.cached_views import CachedViews
    from kd_dist.trained import load
    from kd_dist.training.objectives import distillation_loss

__all__ = ["CachedViews", "__version__", "distillation_loss", "load"]

_MODULES = {"CachedViews": "cached_views", "distillation_loss": "training.objectives", "load": "trained"}


def __getattr__(name: str) -> Any:
    """What the package offers, imported when it is first used: `import kd_dist` alone does not wait for torch."""
    if name in _MODULES:
        return getattr(import_module(f"kd_dist.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
