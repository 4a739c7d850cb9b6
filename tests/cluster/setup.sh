#!/bin/bash
# Prepares this machine for tests/cluster, or takes that back:  setup.sh [install|remove]
#
# install  apt-get installs Slurm (slurm-wlm, which brings munge) and shellcheck, and adds one line to /etc/hosts for the
#          names of the two test nodes. Nothing is enabled or started: the tests start a Slurm of their own in a temporary
#          folder and stop it.
# remove   takes the line out of /etc/hosts again. The packages stay.
set -euo pipefail

readonly hosts_line="127.0.0.1 n1 n2 # two-node Slurm of tests/cluster"

if [ "$(id -u)" -ne 0 ]; then
    echo "setup.sh: installing packages, a line in /etc/hosts and Slurm's daemons need root; type: sudo $0 ${1:-install}" >&2
    exit 2
fi

case "${1:-install}" in
install)
    missing=()
    for program in slurmctld slurmd sbatch shellcheck; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    if [ "${#missing[@]}" -gt 0 ]; then
        echo "setup.sh: installing slurm-wlm and shellcheck (not here: ${missing[*]})"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq
        apt-get install -y -qq --no-install-recommends slurm-wlm munge shellcheck
    fi
    if ! grep -qxF "$hosts_line" /etc/hosts; then
        echo "setup.sh: adding to /etc/hosts: $hosts_line"
        echo "$hosts_line" >>/etc/hosts
    fi
    ;;
remove)
    # Not by `sed -i`: in a container /etc/hosts is a mount, which can be written but not replaced.
    kept=$(grep -vxF "$hosts_line" /etc/hosts || true)
    printf '%s\n' "$kept" >/etc/hosts
    ;;
*)
    echo "setup.sh: $1 is neither install nor remove" >&2
    exit 2
    ;;
esac
