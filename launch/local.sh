#!/usr/bin/env bash
# Trains on this machine, on all of its devices; the same command run again resumes.
#   ./launch/local.sh [--processes=N] [--command=train] [--dry_run] \
#       --config=configs/X.py --workdir=DIR [--config.a.b=v]
# --processes=N starts N processes that share the devices, on a free port of the loopback address;
# when one fails the others are ended, and its status is this script's. --command names another of
# experiments/ (sample, evaluate, encode_latents). Signals are passed on.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

processes=1 command=train dry_run=""
arguments=()
for argument in "$@"; do
  case $argument in
    --processes=*) processes=${argument#*=} ;;
    --command=*) command=${argument#*=} ;;
    --dry_run) dry_run=yes ;;
    *) arguments+=("$argument") ;;
  esac
done
whole_number processes "$processes"
[ -f "experiments/$command.py" ] || refuse "--command=$command is no file of experiments/"

run=(.venv/bin/python -m "experiments.$command" ${arguments[@]+"${arguments[@]}"})
if [ -n "$dry_run" ]; then
  for ((i = 0; i < processes; i++)); do
    if [ "$processes" -gt 1 ]; then
      place=(--coordinator=127.0.0.1:PORT "--num_processes=$processes" "--process_id=$i")
    fi
    quoted "${run[@]}" ${place[@]+"${place[@]}"}
  done
  exit 0
fi
make_environment requirements.txt
[ "$processes" -gt 1 ] || exec "${run[@]}"

port=$(.venv/bin/python -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
children=()
for ((i = 0; i < processes; i++)); do
  place=("--coordinator=127.0.0.1:$port" "--num_processes=$processes" "--process_id=$i")
  if [ "$gpus" -ge "$processes" ]; then # each its share of them
    share=$((gpus / processes))
    JAX_LOCAL_DEVICE_IDS=$(seq -s, $((i * share)) $((i * share + share - 1)))
    export JAX_LOCAL_DEVICE_IDS
  fi
  "${run[@]}" "${place[@]}" &
  children+=($!)
done
pass_on() { kill -s "$1" "${children[@]}" 2>/dev/null || true; }
for name in TERM INT USR1; do
  trap "pass_on $name" "$name"
done

status=0 deadline=""
while :; do
  alive=0
  for child in "${children[@]}"; do
    if kill -0 "$child" 2>/dev/null; then
      alive=$((alive + 1))
    else
      ended=0
      wait "$child" || ended=$?
      if [ "$status" -eq 0 ]; then status=$ended; fi
    fi
  done
  [ "$alive" -gt 0 ] || exit "$status"
  # 75: they have agreed to save and end. Whatever else ends one, the others cannot go on.
  if [ "$status" -ne 0 ] && [ "$status" -ne 75 ]; then
    deadline=${deadline:-$((SECONDS + 10))}
    if [ "$SECONDS" -ge "$deadline" ]; then pass_on KILL; fi
  fi
  sleep 0.2 || true
done
