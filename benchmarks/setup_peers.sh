#!/usr/bin/env bash
# Installs what `make bench` compares with, FFCV and torchdistill, into .venv-bench. That environment sees .venv's
# packages too, so both sides of a row run the same torch; .venv stays as requirements.txt says. FFCV is compiled
# against Debian's OpenCV and turbojpeg, for which this needs root (or have them installed already).
set -euo pipefail
cd "$(dirname "$0")/.."
make setup

if ! pkg-config --exists opencv4 libturbojpeg 2>/dev/null; then
  apt-get update
  apt-get install --yes --no-install-recommends libopencv-dev libturbojpeg0-dev pkg-config
fi

site_packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }
.venv/bin/python -m venv .venv-bench
site_packages .venv > "$(site_packages .venv-bench)/kd_dist_environment.pth"
.venv-bench/bin/pip install --disable-pip-version-check --quiet wheel 'setuptools<81'
.venv-bench/bin/pip install --disable-pip-version-check --quiet --no-build-isolation ffcv==1.0.2
.venv-bench/bin/pip install --disable-pip-version-check --quiet torchdistill==1.1.4  # 1.1.5 caches no teacher's outputs
.venv-bench/bin/python -c 'import ffcv, torchdistill.core.distillation, torch; print("ffcv, torchdistill 1.1.4, torch", torch.__version__)'
