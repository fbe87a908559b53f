#!/usr/bin/env bash
# Trains on a Slurm cluster: submits a job of one process a node, or one a GPU.
#   ./launch/slurm.sh --nodes=N [--gpus_per_node=G] [--task_per=node|gpu] [--time=D-HH:MM:SS]
#       [--partition=P] [--account=A] [--job_name=NAME] [--requeue] [--signal_secs=120]
#       [--sbatch="--mem=0 --constraint=..."] [--dry_run]
#       -- --config=configs/X.py --workdir=DIR [--config.a.b=v]
#
# --signal_secs before the time limit every process is told to save, and ends with status 75. With
# --requeue the job then goes back into the queue, as it does when Slurm takes its nodes away, when
# a step hung (76), a process was lost (77, 134) or the signal came before it was heard (138, 143):
# the same command goes on from the checkpoint.
# An array: --array=FILE --indices=0,2,3 [--max_parallel=N] runs line i + 1 of FILE, words quoted for
# a shell, as task i of one job (launch/sweep.py writes such files).
# The folder of the repository and the workdir must be seen by all nodes. --dry_run prints the job.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

nodes="" gpus="" task_per=node time="" partition="" account="" job_name=diffusion requeue=""
signal_secs=120 extra="" dry_run="" array="" indices="" max_parallel="" output=""
while [ "$#" -gt 0 ]; do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus_per_node=*) gpus=${1#*=} ;;
    --task_per=*) task_per=${1#*=} ;;
    --time=*) time=${1#*=} ;;
    --partition=*) partition=${1#*=} ;;
    --account=*) account=${1#*=} ;;
    --job_name=*) job_name=${1#*=} ;;
    --requeue) requeue=yes ;;
    --signal_secs=*) signal_secs=${1#*=} ;;
    --sbatch=*) extra=${1#*=} ;;
    --array=*) array=${1#*=} ;;
    --indices=*) indices=${1#*=} ;;
    --max_parallel=*) max_parallel=${1#*=} ;;
    --output=*) output=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --)
      shift
      break
      ;;
    *) refuse "$1 is no option of launch/slurm.sh: arguments of the training go after --" ;;
  esac
  shift
done

[ -n "$nodes" ] || refuse "--nodes is missing: give --nodes=N"
whole_number nodes "$nodes"
whole_number signal_secs "$signal_secs"
[ -z "$gpus" ] || whole_number gpus_per_node "$gpus"
[ -z "$max_parallel" ] || whole_number max_parallel "$max_parallel"
tasks=1
case $task_per in
  node) ;;
  gpu)
    [ -n "$gpus" ] || refuse "--task_per=gpu needs --gpus_per_node=G"
    tasks=$gpus
    ;;
  *) refuse "--task_per=$task_per is unknown: use node or gpu" ;;
esac
if [ -n "$array" ]; then
  [ -f "$array" ] || refuse "--array=$array is no file: give one with a command a line"
  [ -n "$indices" ] || refuse "--indices is missing: give the lines of --array to run, from 0"
  array=$(cd "$(dirname "$array")" && pwd)/$(basename "$array")
else
  workdir=""
  for argument in "$@"; do
    case $argument in --workdir=*) workdir=${argument#*=} ;; esac
  done
  [ -n "$workdir" ] || refuse "--workdir is missing: give -- --config=... --workdir=DIR"
  output=${output:-$workdir.slurm-%j.log}
fi
output=${output:-$array.slurm-%A_%a.log}

directives() {
  echo "#SBATCH --job-name=$job_name --nodes=$nodes --ntasks-per-node=$tasks"
  echo "#SBATCH --output=\"$output\" --open-mode=append"
  echo "#SBATCH --signal=USR1@$signal_secs"
  [ -z "$gpus" ] || echo "#SBATCH --gpus-per-node=$gpus"
  [ -z "$time" ] || echo "#SBATCH --time=$time"
  [ -z "$partition" ] || echo "#SBATCH --partition=$partition"
  [ -z "$account" ] || echo "#SBATCH --account=$account"
  [ -z "$extra" ] || echo "#SBATCH $extra"
  [ -z "$array" ] || echo "#SBATCH --array=$indices${max_parallel:+%$max_parallel}"
  if [ -n "$requeue" ]; then echo "#SBATCH --requeue"; else echo "#SBATCH --no-requeue"; fi
}

job() {
  echo "#!/usr/bin/env bash"
  directives
  echo "cd $(printf %q "$PWD") || exit 1"
  if [ -n "$array" ]; then
    echo "eval \"set -- \$(sed -n \"\$((SLURM_ARRAY_TASK_ID + 1))p\" $(printf %q "$array"))\""
  else
    echo "set -- $(quoted .venv/bin/python -m experiments.train "$@")"
  fi
  cat <<'JOB'
status=0
srun --kill-on-bad-exit=0 --wait=60 "$@" || status=$?
JOB
  if [ -n "$requeue" ]; then
    cat <<'JOB'
case $status in
  75 | 76 | 77 | 134 | 138 | 143)
    echo "status $status: back into the queue, to go on from the last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
    ;;
esac
JOB
  fi
  echo 'exit "$status"'
}

if [ -n "$dry_run" ]; then
  job "$@"
  exit 0
fi
for tool in sbatch scontrol; do
  command -v "$tool" >/dev/null || refuse "$tool is not on the PATH: run this where Slurm is installed"
done
make_environment requirements.txt
[ -n "$array" ] || mkdir -p "$(dirname "$workdir")"
job "$@" | sbatch --parsable
