#!/usr/bin/env bash
# Installs rpfm-edge on a bare JetPack 6 or 7, beside JetPack's own TensorRT and without torch. Safe to run again.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: install.sh [--venv DIR] [--from WHAT] [--jtop] [--help]

Installs rpfm-edge with the tensorrt extra on a Jetson with JetPack 6 or 7, in a virtual environment that sees the
TensorRT of JetPack (Debian package python3-libnvinfer). torch is not installed. Running it again updates.

  --venv DIR   the environment (default: ~/rpfm-edge-venv)
  --from WHAT  a checkout, a wheel, or a name that pip knows (default: the checkout that holds this script)
  --jtop       install jetson-stats too (AGPL-3.0, system-wide, with sudo), for rpfm-edge doctor in containers
  --help       this text

Exit code: 0 installed, 2 not, with one sentence on standard error that says why.
TEXT
}

fail() {
    printf 'install.sh: %s\n' "$1" >&2
    exit 2
}

release_file=${NV_TEGRA_RELEASE:-/etc/nv_tegra_release}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
venv=$HOME/rpfm-edge-venv
from=$here
jtop=no

while [ $# -gt 0 ]; do
    case $1 in
        --venv | --from)
            [ $# -ge 2 ] || fail "$1 has no value: expected a path; see --help."
            if [ "$1" = --venv ]; then venv=$2; else from=$2; fi
            shift 2
            ;;
        --jtop) jtop=yes && shift ;;
        --help | -h) usage && exit 0 ;;
        *) fail "unknown option '$1': expected those of --help." ;;
    esac
done

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

installed() {
    [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# cuda-bindings follows the major version of the driver's CUDA: 12 in JetPack 6, 13 in JetPack 7.
l4t=$(sed -n 's/^# R\([0-9]*\) (release), REVISION: \([0-9.]*\).*/\1.\2/p' "$release_file" 2>/dev/null || true)
case $l4t in
    36.*) cuda='cuda-bindings>=12,<13' ;;
    38.* | 39.*) cuda='cuda-bindings>=13,<14' ;;
    '') fail "this is no Jetson ($release_file is missing): expected JetPack 6 or 7; elsewhere use pip install 'rpfm-edge[tensorrt]'." ;;
    *) fail "L4T $l4t is not supported: expected 36 (JetPack 6), 38 or 39 (JetPack 7); flash a newer JetPack." ;;
esac

missing=()
for package in python3-libnvinfer python3-venv; do
    installed "$package" || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    as_root apt-get update || fail "apt-get update failed: expected a network and NVIDIA's package source in /etc/apt; repair them and run this again."
    as_root apt-get install --yes --no-install-recommends "${missing[@]}" ||
        fail "apt-get could not install ${missing[*]}: expected JetPack's package source; run sudo apt-get install nvidia-jetpack and this again."
fi

if [ -e "$venv" ] && ! grep -qs '^include-system-site-packages = true' "$venv/pyvenv.cfg"; then
    fail "$venv is no environment that sees the system's packages: expected one of this script; delete it, or give another --venv."
fi
[ -e "$venv" ] || python3 -m venv --system-site-packages "$venv" ||
    fail "$venv could not be made: expected a folder that can be written; give another --venv."

"$venv/bin/python" -m pip install --upgrade "${from}[tensorrt]" "$cuda" ||
    fail "pip could not install ${from}[tensorrt]: expected a checkout, a wheel or a known name, and a network; see pip's message above."

if [ "$jtop" = yes ]; then
    # the service has to be the system's own; Ubuntu 24.04 asks for --break-system-packages, 22.04 does not know it
    externally=()
    [ "${l4t%%.*}" -ge 38 ] && externally=(--break-system-packages)
    as_root python3 -m pip install --upgrade "${externally[@]}" jetson-stats ||
        fail "jetson-stats could not be installed: expected python3-pip and a network; run this again without --jtop."
fi

"$venv/bin/python" -c 'import tensorrt' ||
    fail "Python cannot import TensorRT: expected the bindings of python3-libnvinfer for this Python; run sudo apt-get install --reinstall python3-libnvinfer."
"$venv/bin/python" -c 'import sys, tensorrt; sys.exit(tensorrt.__file__.startswith(sys.prefix))' ||
    fail "pip brought a TensorRT of its own into $venv: expected JetPack's alone; run $venv/bin/pip uninstall tensorrt and this again."
"$venv/bin/rpfm-edge" doctor || fail "rpfm-edge doctor failed: expected it to run; see its message above."
printf '\nInstalled. Next: source %s/bin/activate && rpfm-edge build BUNDLE --target tensorrt --out BUNDLE\n' "$venv"
