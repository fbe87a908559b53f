#!/usr/bin/env bash
# Makes .venv, installs what is needed, and runs the default job end to end: text to image in a
# latent space, on real handwritten digits. Results and pictures go to runs/quickstart (or DIR).
#   ./launch/quickstart.sh [--workdir=DIR] [--smoke]
set -euo pipefail
started=$(date +%s)
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment requirements.txt
exec .venv/bin/python -m experiments.quickstart --started="$started" "$@"
