#!/usr/bin/env bash
# Makes .venv, installs the test requirements, and runs the whole test suite, saying every half
# minute how long is left.
#   ./launch/test.sh                     every test of the default suite
#   ./launch/test.sh -m slow             the slow suite
#   ./launch/test.sh tests/process -x    anything that pytest takes
#   PYTHON=python3.13 ./launch/test.sh   another interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment requirements-test.txt
if [ "$#" -eq 0 ]; then
  # two processes, each with whole files, the longest first (tests/conftest.py)
  set -- -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder
fi
exec .venv/bin/python -m pytest "$@"
