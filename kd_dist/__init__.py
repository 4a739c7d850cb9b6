"""kd_dist: offline knowledge distillation on many GPUs, two jobs and one HDF5 file of soft labels between them."""

from typing import TYPE_CHECKING, Any

from kd_dist.version import __version__

if TYPE_CHECKING:
    from kd_dist.trained import load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """`kd_dist.load`, imported when it is first used: `import kd_dist` alone does not wait for torch."""
    if name == "load":
        from kd_dist.trained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
