# shellcheck shell=bash
# What setup_cpu_env.sh and setup_gpu_env.sh have in common; they source it. They set root and venv
# before, and define `fingerprint`: what the environment is made of, as one line.

# shellcheck disable=SC2154
mark="$venv/.gpg-made-here"  # written first; holds the path, since environments cannot be moved
stamp="$venv/.gpg-complete"  # written last; holds the fingerprint of what was installed
log="$venv/install.log"

say() { printf '[setup] %s\n' "$*"; }

fail() {
  printf '[setup] %s\n' "$2" >&2
  exit "$1"
}

is_ours() {
  [[ -x "$venv/bin/python" && -f "$mark" && "$(<"$mark")" == "$venv" ]]
}

is_complete() {
  [[ -x "$venv/bin/python" && -f "$stamp" && "$(<"$stamp")" == "$(fingerprint)" ]]
}

# An empty environment of this Python. One that was interrupted half-way or copied from elsewhere is
# made anew, but a folder that these scripts did not make is never touched.
new_venv() {
  local python="$1" size="$2"
  say "making $venv (about $size; log: install.log in it)"
  if [[ -f "$mark" ]]; then
    rm -rf "$venv"
  elif [[ -d "$venv" && -n "$(ls -A "$venv")" ]]; then
    fail 2 "$venv exists and was not made by this script; move it away or set GPG_VENV"
  fi
  mkdir -p "$venv"
  printf '%s\n' "$venv" >"$mark"
  "$python" -m venv "$venv"
}

# Installs quietly; what pip says goes to the log.
pip_quietly() {
  "$venv/bin/python" -P -m pip install --no-input --disable-pip-version-check \
    --progress-bar off "$@" >>"$log" 2>&1
}

require() {
  local what="$1"
  shift
  "$@" || {
    tail -n 15 "$log" >&2
    fail 1 "installing $what failed; the lines above are the end of $log"
  }
}

mark_complete() {
  fingerprint >"$stamp.new"
  mv "$stamp.new" "$stamp"
}
