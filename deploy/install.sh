#!/bin/sh
# Installs Townhall from the directory of this file, without a network:
#
#   ./install.sh [--prefix DIR] [--bin DIR] [--python PROGRAM] [--service [WORD …]]
#
#   --prefix   directory to install into (default: /opt/townhall for root, ~/.local/share/townhall for others)
#   --bin      directory for the links tt and townhall (default: /usr/local/bin for root, ~/.local/bin for others)
#   --python   the Python that runs it, 3.11 or newer (default: the first usable of python3, python3.14 … python3.11)
#   --service  must come last: then runs  townhall service install WORD …
#
# Each version gets its own directory in PREFIX/releases; PREFIX/current links to the latest. A running townhall keeps the
# version that it was started from. Installing the same version again changes nothing.
set -eu
umask 022
unset PYTHONPATH PYTHONHOME || :

stop() {
    echo "install.sh: $1" >&2
    exit 1
}

prefix='' bin='' python='' service=''
while [ $# -gt 0 ]; do
    case $1 in
        --prefix | --bin | --python) [ $# -gt 1 ] || stop "$1 needs a value" ;;
    esac
    case $1 in
        --prefix) prefix=$2 && shift 2 ;;
        --bin) bin=$2 && shift 2 ;;
        --python) python=$2 && shift 2 ;;
        --service) service=yes && shift && break ;;
        --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit ;;
        *) stop "$1 is not known; see  $0 --help" ;;
    esac
done
if [ -z "$prefix" ] || [ -z "$bin" ]; then
    if [ "$(id -u)" = 0 ]; then
        : "${prefix:=/opt/townhall}" "${bin:=/usr/local/bin}"
    else
        [ -n "${HOME:-}" ] || stop "HOME is not set; give --prefix and --bin"
        : "${prefix:=$HOME/.local/share/townhall}" "${bin:=$HOME/.local/bin}"
    fi
fi
case $prefix$bin in
    *[[:space:]]*) stop "'$prefix', '$bin': no spaces in directories, please; the scripts in them could not name their Python" ;;
esac
prefix=${prefix%/} bin=${bin%/}
case $prefix in /*) ;; *) prefix=$(pwd)/$prefix ;; esac
case $bin in /*) ;; *) bin=$(pwd)/$bin ;; esac
case $python in [!/]*/*) python=$(pwd)/$python ;; esac

cd "$(dirname "$0")"
sha256sum -c SHA256SUMS >/dev/null 2>&1 || stop "this bundle is damaged; copy it here again"
version=$(cat version)

# Whether this bundle has wheels for a Python. Debian's has `venv` even without python3-venv, which only adds pip.
fits() {
    tag=$("$1" -c 'import sys, venv; print("cp%d%d" % sys.version_info[:2])' 2>/dev/null) &&
        ls wheels/cffi-*-"$tag"-*.whl >/dev/null 2>&1
}
if [ -n "$python" ]; then
    fits "$python" || stop "$python is not a Python 3.11 to 3.14 with the module venv; give another with --python"
else
    for python in python3 python3.14 python3.13 python3.12 python3.11 ''; do
        [ -z "$python" ] || ! fits "$python" || break
    done
    [ -n "$python" ] || stop "no Python 3.11 to 3.14 with the module venv is on the PATH; install one (Debian, Ubuntu:
apt install python3; Fedora: dnf install python3), or give the path of one with --python"
    fits "$python"
fi
"$python" -c 'import os, sys; sys.exit(os.uname().machine not in sys.argv[1])' "$(ls wheels)" ||
    stop "this bundle is not for $(uname -m); get the bundle for this machine"

for name in tt townhall; do
    if [ -e "$bin/$name" ] || [ -L "$bin/$name" ]; then
        case $(readlink "$bin/$name") in
            "$prefix"/*) ;;
            *) stop "$bin/$name exists and does not belong to $prefix; remove it, or choose another directory with --bin" ;;
        esac
    fi
done

# ------------------------------------------------------------------------------------------------------- installation

release=$prefix/releases/$version-$(sha256sum SHA256SUMS | cut -c 1-12)-$tag
if [ ! -e "$release/complete" ] || ! "$release/bin/townhall" --version >/dev/null 2>&1; then
    rm -rf "$release"
    mkdir -p "$prefix/releases"
    "$python" -m venv --without-pip "$release"
    "$release/bin/python" -I "$(echo wheels/pip-*.whl)/pip" --isolated install --quiet --no-index --find-links wheels \
        --no-cache-dir --disable-pip-version-check --root-user-action ignore "tinytown[embedded,fast]==$version"
    "$release/bin/townhall" --version >/dev/null
    : >"$release/complete"
fi

# Replaces a link in one step: a reader finds the old or the new target.
link() {
    ln -s "$1" "$2.$$"
    mv -fT "$2.$$" "$2"
}
before=$(readlink "$prefix/current" || :)
mkdir -p "$bin"
[ "$before" = "$release" ] || link "$release" "$prefix/current"
for name in tt townhall; do
    [ "$(readlink "$bin/$name" || :)" = "$prefix/current/bin/$name" ] || link "$prefix/current/bin/$name" "$bin/$name"
done

# Removes old versions, except the previous one (for a rollback) and any that a process or a systemd unit uses.
units="/etc/systemd/system/*.service ${HOME:-}/.config/systemd/user/*.service"
for each in "$prefix"/releases/*; do
    [ "$before" != "$release" ] || break
    if [ "$each" != "$release" ] && [ "$each" != "$before" ] && ! grep -qsF "$each/" /proc/[0-9]*/cmdline $units; then
        rm -rf "$each"
    fi
done

echo "Townhall $version is in $prefix; tt and townhall are in $bin."
case :$PATH: in
    *":$bin:"*) ;;
    *) echo "$bin is not on your PATH; add it:  export PATH=$bin:\$PATH" ;;
esac
[ -z "$service" ] || exec "$bin/townhall" service install "$@"
