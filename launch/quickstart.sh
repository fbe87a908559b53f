#!/usr/bin/env bash
# Makes .venv, installs what is needed, and runs the default job end to end: text to image in a
# latent space, on real handwritten digits; or the same of a folder of your own pictures. Results
# and pictures go to runs/quickstart, or runs/ and the folder's name, or DIR.
#   ./launch/quickstart.sh [--workdir=DIR] [--smoke]
#   ./launch/quickstart.sh --images=FOLDER [--minutes=15] [--workdir=DIR]
set -euo pipefail
started=$(date +%s)
from=$PWD
cd "$(dirname "$0")/.."
source launch/environment.sh
words=()
for word in "$@"; do  # folders are named as seen from where the command was given
  [[ $word =~ ^--(images|workdir)=[^/] ]] && word="${word%%=*}=$from/${word#*=}"
  words+=("$word")
done
make_environment requirements.txt
exec .venv/bin/python -m experiments.quickstart --started="$started" ${words[@]+"${words[@]}"}
