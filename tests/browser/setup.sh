#!/bin/bash
# Prepares this machine for tests/browser: apt-get installs Debian's chromium and its WebDriver, where they are missing.
set -euo pipefail

if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then
    exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "setup.sh: installing packages needs root; type: sudo $0" >&2
    exit 2
fi
echo "setup.sh: installing chromium and chromium-driver"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends chromium chromium-driver
