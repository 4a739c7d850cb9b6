"""The version, spelled here alone, and the line by which every file that we write names what wrote it."""

import platform

__version__ = "1.0.0.dev0"


def software() -> str:
    """What wrote a file: "kd_dist VERSION, torch VERSION, Python VERSION"."""
    import torch  # who asks for the version alone does not wait for torch

    return f"kd_dist {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
