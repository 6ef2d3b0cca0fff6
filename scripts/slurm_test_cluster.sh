#!/usr/bin/env bash
# A real SLURM of one node on this machine, to test the launcher with: munged, slurmctld and slurmd
# from Debian's packages, with a configuration, keys, ports and state of their own in one folder.
# Nothing outside it is read or written, so it may stand beside another SLURM. Needs root.
#
#   scripts/slurm_test_cluster.sh install        # apt-get install slurm-wlm munge
#   scripts/slurm_test_cluster.sh start [DIR]    # prints the line that the shell needs
#   scripts/slurm_test_cluster.sh status [DIR]
#   scripts/slurm_test_cluster.sh stop [DIR]
#
# DIR is /tmp/normlab-slurm unless given.
set -euo pipefail

usage() {
  sed -n '6,9s/^#   //p' "$0" >&2
  exit 2
}

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  usage
fi
ACTION=$1
DIR=${2:-/tmp/normlab-slurm}
case $DIR in /*) ;; *) DIR=$PWD/$DIR ;; esac
export SLURM_CONF=$DIR/slurm.conf
DAEMONS="slurmd slurmctld munged"  # in the order in which they stop
PATH=$PATH:/usr/sbin

fail() {
  echo "slurm_test_cluster.sh: $*" >&2
  exit 1
}

need_root() {
  [ "$(id -u)" = 0 ] || fail "$ACTION needs root: slurmd changes to the user of each job"
}

alive() { # alive DAEMON: its process lives
  [ -s "$DIR/$1.pid" ] && kill -0 "$(cat "$DIR/$1.pid")" 2>/dev/null
}

await() { # await SECONDS WHAT COMMAND...
  local until=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    if [ $SECONDS -ge $until ]; then
      tail -n 5 "$DIR"/*.log >&2 || true
      fail "$what did not happen; the logs are in $DIR"
    fi
    sleep 0.2
  done
}

no_jobs() {
  [ -z "$(squeue --noheader)" ]
}

free_ports() { # two ports that nobody has
  python3 -c '
import socket
held = [socket.socket() for _ in range(2)]
for s in held:
    s.bind(("", 0))
print(*(s.getsockname()[1] for s in held))'
}

write_configuration() {
  local host controller node memory
  host=$(hostname -s)
  read -r controller node < <(free_ports)
  memory=$(awk '/^MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
  # CgroupPlugin=disabled is unknown to SLURM 22.05; without cgroups in use, v1 is never touched.
  echo "CgroupPlugin=cgroup/v1" >"$DIR/cgroup.conf"
  cat >"$SLURM_CONF" <<CONF
ClusterName=normlab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller
SlurmdPort=$node
AuthType=auth/munge
AuthInfo=socket=$DIR/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdLogFile=$DIR/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1024
ReturnToService=2
KillWait=5
MinJobAge=10
JobRequeue=1
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory
PartitionName=test Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
  need_root
  for daemon in $DAEMONS; do
    command -v "$daemon" >/dev/null || fail "no $daemon here; '$0 install' installs it"
    ! alive "$daemon" || fail "$daemon runs already in $DIR; '$0 stop $DIR' stops it"
  done
  mkdir -p "$DIR"
  chmod 755 "$DIR"
  mkdir -p "$DIR/state" "$DIR/spool"
  (umask 077 && head -c 128 /dev/urandom >"$DIR/munge.key")
  write_configuration
  munged --key-file="$DIR/munge.key" --socket="$DIR/munge.socket" --pid-file="$DIR/munged.pid" \
    --log-file="$DIR/munged.log" --seed-file="$DIR/munge.seed"
  slurmctld -c 2>>"$DIR/start.log" || fail "slurmctld: $(tail -n 1 "$DIR/start.log")"
  await 20 "slurmctld's answer" scontrol ping
  slurmd -c 2>>"$DIR/start.log" || fail "slurmd: $(tail -n 1 "$DIR/start.log")"
  await 20 "a job" srun --immediate=5 true
  echo "export SLURM_CONF=$SLURM_CONF"
}

stop() {
  need_root
  if alive slurmctld; then
    scancel --user=root 2>/dev/null || true  # this cluster's: SLURM_CONF says which
    await 30 "the end of the jobs" no_jobs
  fi
  for daemon in $DAEMONS; do
    if alive "$daemon"; then
      pid=$(cat "$DIR/$daemon.pid")
      kill "$pid"
      await 20 "the end of $daemon" sh -c "! kill -0 $pid"
    fi
  done
}

status() {
  local code=0
  for daemon in munged slurmctld slurmd; do
    if alive "$daemon"; then
      echo "$daemon runs, process $(cat "$DIR/$daemon.pid")"
    else
      echo "$daemon does not run"
      code=1
    fi
  done
  [ $code = 0 ] && sinfo
  return $code
}

case $ACTION in
  install)
    need_root
    apt-get install -y --no-install-recommends slurm-wlm munge
    ;;
  start) start ;;
  stop) stop ;;
  status) status ;;
  *) usage ;;
esac
