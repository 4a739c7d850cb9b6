"""Where the packages lie: launch/ and slurm/ stand beside kd_dist/ in a checkout and are installed inside it, as
kd_dist.launch and kd_dist.slurm, so that the wheel takes no general name. All else is in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["kd_dist", "kd_dist.*"]), "kd_dist.launch", "kd_dist.slurm"],
    package_dir={"kd_dist": "kd_dist", "kd_dist.launch": "launch", "kd_dist.slurm": "slurm"},
    package_data={"kd_dist.slurm": ["*"], "kd_dist.models": ["*.txt"]},
    include_package_data=False,
)
