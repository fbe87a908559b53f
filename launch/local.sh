#!/usr/bin/env bash
# Trains on this machine, on all of its devices; the same command run again resumes.
#   ./launch/local.sh --config=configs/X.py --workdir=DIR [--config.a.b=v]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment requirements.txt
exec .venv/bin/python -m experiments.train "$@"
