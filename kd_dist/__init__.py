"""kd_dist: offline knowledge distillation on many GPUs, two jobs and one HDF5 file of soft labels between them."""

from kd_dist.version import __version__

__all__ = ["__version__"]
