#!/usr/bin/env bash
# Trains on Kubernetes: renders launch/k8s/{gpu,tpu}.yaml and applies it. Needs the JobSet controller.
#   ./launch/k8s.sh --kind=gpu --nodes=N --gpus_per_node=G --image=IMAGE --claim=PVC \
#       [--name=NAME] [--mount=/runs] [--max_restarts=100] [--dry_run] -- --config=… --workdir=/runs/a
#   ./launch/k8s.sh --kind=tpu --nodes=N --chips_per_node=4 --accelerator=tpu-v5p-slice \
#       --topology=2x2x4 --image=IMAGE --claim=PVC … -- --config=… --workdir=/runs/a
# IMAGE holds this repository as its working folder with requirements.txt and the accelerator's jax
# installed; PVC is a volume that all pods may write (ReadWriteMany), mounted at --mount.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

kind="" nodes="" per_node="" image="" claim="" name=diffusion mount=/runs max_restarts=100
accelerator="" topology="" dry_run=""
while [ "$#" -gt 0 ]; do
  case $1 in
    --kind=*) kind=${1#*=} ;;
    --nodes=*) nodes=${1#*=} ;;
    --gpus_per_node=* | --chips_per_node=*) per_node=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --claim=*) claim=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --mount=*) mount=${1#*=} ;;
    --max_restarts=*) max_restarts=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --)
      shift
      break
      ;;
    *) refuse "$1 is no option of launch/k8s.sh: arguments of the training go after --" ;;
  esac
  shift
done

case $kind in
  gpu) per=gpus_per_node ;;
  tpu) per=chips_per_node ;;
  *) refuse "--kind=$kind is unknown: use gpu or tpu" ;;
esac
whole_number nodes "$nodes"
whole_number "$per" "$per_node"
whole_number max_restarts "$max_restarts"
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || refuse "--name=$name must be of a-z, 0-9 and -"
for required in image claim; do
  [ -n "${!required}" ] || refuse "--$required is missing: give --$required=…"
done
if [ "$kind" = tpu ]; then
  for required in accelerator topology; do
    [ -n "${!required}" ] || refuse "--$required is missing: --kind=tpu needs it"
  done
fi

# Kubernetes would read \$(NAME) in an argument as a variable: \$\$ keeps it as it is.
json() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  printf '"%s"' "$text"
}
list="["
for argument in "$@"; do
  list+="$(json "${argument//\$(/\$\$(}"), "
done
if [ "$kind" = tpu ]; then
  list+='"--coordinator=auto"]'
elif [ "$nodes" -eq 1 ]; then
  list="${list%, }]"
else
  list+="\"--coordinator=$name-worker-0-0.$name:8476\", \"--num_processes=$nodes\", "
  list+='"--process_id=$(PROCESS_ID)"]'
fi

text=$(<"launch/k8s/$kind.yaml")
put() { text=${text//"\${$1}"/"$2"}; }
put NAME "$name"
put NODES "$nodes"
put PER_NODE "$per_node"
put MAX_RESTARTS "$max_restarts"
put IMAGE "$(json "$image")"
put CLAIM "$(json "$claim")"
put MOUNT "$(json "$mount")"
put ACCELERATOR "$(json "$accelerator")"
put TOPOLOGY "$(json "$topology")"
put ARGUMENTS "$list"

if [ -n "$dry_run" ]; then
  echo "$text"
  exit 0
fi
command -v kubectl >/dev/null || refuse "kubectl is not on the PATH: run this where it is installed"
echo "$text" | kubectl apply -f -
