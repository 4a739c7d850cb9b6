"""The version, spelled here alone, and the line by which every file that we write names what wrote it."""

import platform

__version__ = "1.0.0.dev0"


def software() -> str:
    """What wrote a file: "kd_dist VERSION, torch VERSION, Python VERSION"."""
    import torch  # who asks for the version alone does not wait for torch

    return f"kd_dist {__version__}, torch {torch.__version__}, Python {platform.python_version()}"


def commit() -> str:
    """The commit of this package's source, with "-dirty" behind it where files were changed since; "not known" for an
    installation that does not say.
    """
    import subprocess
    from pathlib import Path

    here = Path(__file__).resolve().parent
    git = ("git", "-C", str(here))
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], check=True, capture_output=True)
        command = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return _installed_commit() or "not known"


def _installed_commit() -> str | None:
    """The commit that pip noted where it installed from a repository."""
    import json
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        text = distribution("kd-dist").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    return json.loads(text).get("vcs_info", {}).get("commit_id") if text else None
