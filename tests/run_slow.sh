#!/usr/bin/env bash
# The static checks and the tests that take minutes. Arguments as in run.sh.
exec "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/run.sh" -m slow "$@"
