#!/usr/bin/env bash
# A run on Slurm nodes: sbatch cluster/slurm.sh EXPERIMENT... [options of minitron-ray run], from the folder
# that holds .venv, on a file system that all nodes share. Follow it from the login node with
# `minitron-ray watch`. Ten minutes before the time limit Slurm's signal stops the run at a safe point, and
# the job goes back into the queue, from where it goes on; also where the cluster was lost, three times at most.
# A node that is lost does not end the job: the distillation goes on with the others' workers.
#SBATCH --job-name=minitron-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=minitron-ray-%j.log

set -euo pipefail

if [ "$#" -lt 1 ]; then
  echo "usage: sbatch cluster/slurm.sh EXPERIMENT... [options of minitron-ray run]" >&2
  exit 2
fi

bin="${MINITRON_RAY_BIN:-$PWD/.venv/bin}"
port="${MINITRON_RAY_PORT:-6379}"   # below 10002, where the ports of Ray's workers begin

# The job's own token. Every process of the job inherits the path; only its user can read the file.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="${MINITRON_RAY_TOKENS:-$HOME/.ray}/token-$SLURM_JOB_ID"
mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH")

# One worker a GPU, or a node where there are none, and fewer where nodes are lost. --cluster FILE replaces it.
settings="$(dirname "$RAY_AUTH_TOKEN_PATH")/workers-$SLURM_JOB_ID.yaml"
each="${SLURM_GPUS_ON_NODE:-0}"
echo "workers: 1..$((SLURM_JOB_NUM_NODES * (each > 0 ? each : 1)))" > "$settings"

# The batch script runs on the first node: that is Ray's head, and the run is driven here.
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
ip="$(srun --nodes=1 --ntasks=1 --overlap --nodelist="$first" hostname --ip-address | awk '{print $1}')"
address="$ip:$port"
limits=(--num-cpus "${SLURM_CPUS_PER_TASK:-1}" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats)
nodes=()
end_nodes() {
  for node in "${nodes[@]}"; do kill -TERM "$node" 2> /dev/null || true; done
  for node in "${nodes[@]}"; do wait "$node" || true; done
  rm -f "$RAY_AUTH_TOKEN_PATH" "$settings"
}
trap end_nodes EXIT

srun --nodes=1 --ntasks=1 --overlap --nodelist="$first" \
  "$bin/ray" start --head --block --node-ip-address="$ip" --port="$port" --dashboard-host=127.0.0.1 \
  "${limits[@]}" > /dev/null &
nodes+=($!)
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  others=$((SLURM_JOB_NUM_NODES - 1))
  # One that is lost must not end the others: the run goes on with those.
  srun --nodes="$others" --ntasks="$others" --overlap --exclude="$first" --kill-on-bad-exit=0 --no-kill \
    "$bin/ray" start --block --address="$address" "${limits[@]}" > /dev/null &
  nodes+=($!)
fi
"$bin/python" - "$address" "$SLURM_JOB_NUM_NODES" <<'PYTHON'
import sys, time, ray

deadline = time.monotonic() + 300
while True:
    try:
        ray.init(address=sys.argv[1], log_to_driver=False, logging_level="CRITICAL")
        break
    except (ConnectionError, RuntimeError, ValueError):
        if time.monotonic() > deadline:
            sys.exit(f"Ray's head at {sys.argv[1]} did not start within 300 s")
        time.sleep(2)
while (alive := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[2]):
    if time.monotonic() > deadline:
        sys.exit(f"{alive} of {sys.argv[2]} nodes joined Ray within 300 s")
    time.sleep(2)
PYTHON

stopping=0
driver=
stop() {
  stopping=1
  [ -z "$driver" ] || kill -TERM "$driver" 2> /dev/null || true
}
trap stop TERM
"$bin/minitron-ray" run --cluster "$settings" "$@" --address "$address" &
driver=$!
code=0
wait "$driver" || code=$?
while kill -0 "$driver" 2> /dev/null; do   # a signal ends `wait`, not the run
  code=0
  wait "$driver" || code=$?
done
lost=0
if [ "$code" -eq 3 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then lost=1; fi
if [ "$code" -ne 0 ] && [ "$stopping$lost" != 00 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
