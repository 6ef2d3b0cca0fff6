#!/usr/bin/env bash
# One run on all machines of a TPU slice (Cloud TPU VMs that exist), started from your own machine:
#
#   scripts/templates/tpu_pod.sh NAME ZONE --config=configs/imagenet.py --workdir=/mnt/runs/big
#
# What stands behind the zone goes to `normlab train`. On each machine the checkout lies in
# ~/normlab with its environment in .venv (pip install -e . 'jax[tpu]'). The folder of the run must
# be one that all machines see, e.g. Filestore mounted at /mnt/runs. Ended by Ctrl-C, a lost
# connection, maintenance or preemption: type it again, and the run goes on.
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '4s/^#   /usage: /p' "$0" >&2
  exit 2
fi
name=$1 zone=$2
shift 2

# Addresses inside the slice, in the order of the machines' numbers; the first one coordinates.
addresses=$(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" \
  --format='value[delimiter=" "](networkEndpoints[].ipAddress)')
read -r -a hosts <<<"$addresses"

# A machine finds its number there. The run's arguments are quoted once more, for its shell.
number="\$(curl -sf -H Metadata-Flavor:Google \
http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)"
place="--coordinator=${hosts[0]}:8476 --num-processes=${#hosts[@]} --process-id=$number"
arguments=$(printf '%q ' "$@")
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd ~/normlab && exec .venv/bin/normlab train --distributed $place $arguments"
