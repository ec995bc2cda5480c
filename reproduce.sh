#!/usr/bin/env bash
# From a fresh machine to a paper's figures and verdict: sets up Python once, then hands over to it.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
  cat <<'EOF'
usage: ./reproduce.sh <paper> [--tier smoke|laptop|full|paper] [-p name value]...
                              [--resume] [--fresh] [--dry-run] [--from-scratch]
                                        rerun a paper, redraw its figures, print the verdict
       ./reproduce.sh list              the papers
       ./reproduce.sh all [options]     every paper in turn
       ./reproduce.sh lab               JupyterLab, for this machine only
       ./reproduce.sh test [arguments]  the tests; arguments go to pytest
       ./reproduce.sh lint              the linter and the formatter's check

The first run creates .venv with the pinned packages; relative paths start at this folder.
EOF
}

say() { echo "reproduce.sh: $*" >&2; }
fail() { say "$@"; exit 1; }

# An active environment that has specrepro installed is used as it is; our own .venv is kept up to date instead.
environment_is_active() {
  [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ "${VIRTUAL_ENV:-}" != "$PWD/.venv" ] &&
    python -P -c 'import specrepro' 2>/dev/null # -P: installed, not merely found in this folder
}

find_python() {
  for candidate in python3.11 python3.12 python3; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
      echo "$candidate" && return
    fi
  done
  fail "needs Python 3.11 or 3.12; found $(python3 --version 2>/dev/null || echo none)" \
    "(on Debian: apt-get install python3.11 python3.11-venv python3.11-dev gcc)"
}

require_build_tools() { # reasoning-gym's pycosat is compiled when installed, Triton's launchers when first run
  local missing=()
  "$1" -c 'import ensurepip' 2>/dev/null || missing+=("$1-venv")
  "$1" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || missing+=("$1-dev")
  command -v gcc cc >/dev/null || missing+=(gcc)
  [ ${#missing[@]} = 0 ] || fail "missing here: ${missing[*]} (on Debian: apt-get install ${missing[*]})"
}

# .venv/pins holds the hash of the pyproject.toml that was installed, or "unfinished" while a run installs or was killed at it.
is_installed() { [ -x .venv/bin/python ] && [ "$(cat .venv/pins 2>/dev/null)" = "$(sha256sum <pyproject.toml)" ]; }

install() {
  local python
  python=$(find_python)
  require_build_tools "$python"
  if [ ! -x .venv/bin/python ] || grep -qs unfinished .venv/pins; then rm -rf .venv; fi
  say "setting up .venv with the pinned packages; the first time takes minutes and gigabytes"
  mkdir -p .venv && echo unfinished >.venv/pins
  [ -x .venv/bin/python ] || "$python" -m venv .venv >&2
  if ! .venv/bin/python -m pip install --no-input -e '.[dev]' >.venv/install.log 2>&1; then
    rm .venv/pins # pip gave up in good order, so what is there can be built upon
    tail -n 15 .venv/install.log >&2
    fail "the installation failed; the last lines of .venv/install.log are above"
  fi
  sha256sum <pyproject.toml >.venv/pins
}

set_up() {
  is_installed && return
  flock 9 # of two runs started together, one installs and the other waits for it
  is_installed || install
} 9<pyproject.toml

case ${1:-} in
  "") usage >&2 && exit 2 ;;
  -h | --help | help) usage && exit 0 ;;
  -*) say "unknown option $1: the paper comes first" && usage >&2 && exit 2 ;;
esac

if environment_is_active; then
  python=python
else
  set_up
  python=.venv/bin/python
fi

case $1 in
  test)
    if [ $# = 1 ]; then # all of them: files side by side, each on one thread; chosen ones go as pytest is told
      export OMP_NUM_THREADS=1
      set -- test --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 15
    fi
    exec "$python" -m pytest "${@:2}"
    ;;
  lab) exec "$python" -m jupyterlab "${@:2}" --ip=127.0.0.1 ;;
  lint) "$python" -m ruff check . && exec "$python" -m ruff format --check . ;;
  *) exec "$python" -m specrepro "$@" ;;
esac
