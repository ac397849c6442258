#!/usr/bin/env bash
# Two hosts on one machine, for benchmarks: network namespaces mell1 and mell2, joined by a link.
#   two_hosts.sh up [RATE]           RATE such as 10gbit or 1gbit: a token bucket each way (tc)
#   two_hosts.sh rate RATE           changes the rate, also while a job runs
#   two_hosts.sh mpirun …            starts it on mell1; the hosts are 10.78.0.1 and 10.78.0.2
#   two_hosts.sh down
# Needs root and iproute2. Each namespace has its own host name, so that MPI sees two hosts.
set -euo pipefail
self=$(realpath "${BASH_SOURCE[0]}")

# Run a command on that host. Unlike "ip netns exec", nsenter does not remount /sys.
on() {
  local host=$1
  shift
  exec nsenter --net=/run/netns/"$host" unshare --uts bash -c 'hostname "$0"; exec "$@"' "$host" "$@"
}

case "${1:-}" in
  up)
    "$self" down
    for i in 1 2; do ip netns add mell$i; done
    ip link add mell1v type veth peer name mell2v
    for i in 1 2; do
      ip link set mell${i}v netns mell$i
      ip -n mell$i addr add 10.78.0.$i/24 dev mell${i}v
      ip -n mell$i link set mell${i}v up
      ip -n mell$i link set lo up
    done
    [[ -z "${2:-}" ]] || "$self" rate "$2" ;;
  rate)
    # The bucket holds about 2 to 3 ms of the rate: tc cannot refill a smaller one in time.
    case "$2" in
      1gbit) bucket="256kb" ;;
      *) bucket="4mb" ;;
    esac
    for i in 1 2; do
      tc -n mell$i qdisc replace dev mell${i}v root tbf rate "$2" burst "$bucket" latency 50ms
    done ;;
  down)
    for i in 1 2; do ip netns del mell$i 2>/dev/null || true; done ;;
  agent)  # replaces ssh: agent [-options] HOST COMMAND …
    shift
    while [[ "$1" == -* ]]; do shift; done
    host=mell${1##*[.l]}
    shift
    on "$host" bash -c "$*" ;;
  mpirun)
    shift
    agent=$(mktemp)
    trap 'rm -f "$agent"' EXIT
    printf '#!/bin/bash\nexec "%s" agent "$@"\n' "$self" >"$agent"
    chmod +x "$agent"
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    on_first=(nsenter --net=/run/netns/mell1 unshare --uts bash -c 'hostname mell1; exec "$@"' mell1)
    "${on_first[@]}" mpirun --prtemca plm_ssh_agent "$agent" --bind-to none "$@" ;;
  *)
    sed -n 2,7p "$self"
    exit 2 ;;
esac
