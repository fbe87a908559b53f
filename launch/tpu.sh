#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU VM: copies the repository to them, installs, and starts.
#   ./launch/tpu.sh --name=TPU --zone=ZONE [--project=P] [--dry_run] -- --config=… --workdir=DIR
# DIR is on a file system that all workers see (Filestore, or a mounted bucket). The same command
# run again resumes; it goes on while this does: start it under tmux or nohup. --dry_run prints it.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

name="" zone="" project="" dry_run=""
while [ "$#" -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --)
      shift
      break
      ;;
    *) refuse "$1 is no option of launch/tpu.sh: arguments of the training go after --" ;;
  esac
  shift
done
for required in name zone; do
  [ -n "${!required}" ] || refuse "--$required is missing: give --$required=…"
done

where=("--zone=$zone" --worker=all ${project:+"--project=$project"})
archive=diffusion-$name.tar.gz
install='mkdir -p diffusion && tar -xzf '$archive' -C diffusion && cd diffusion'
install+=' && source launch/environment.sh && make_environment requirements.txt'
install+=' && .venv/bin/python -m pip install --quiet "jax[tpu]"'
train="cd diffusion && exec $(quoted .venv/bin/python -m experiments.train "$@" --coordinator=auto)"
commands=(
  "$(quoted gcloud compute tpus tpu-vm scp "/tmp/$archive" "$name:$archive" "${where[@]}")"
  "$(quoted gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--command=$install")"
  "$(quoted gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--command=$train")"
)
if [ -n "$dry_run" ]; then
  echo "git ls-files -z | tar --null --files-from=- -czf /tmp/$archive"
  printf '%s\n' "${commands[@]}"
  exit 0
fi
command -v gcloud >/dev/null || refuse "gcloud is not on the PATH: install the Google Cloud CLI"
git ls-files -z | tar --null --files-from=- -czf "/tmp/$archive"
for line in "${commands[@]}"; do
  eval "$line"
done
