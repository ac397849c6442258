#!/usr/bin/env bash
# mpirun with the flags that mellmpi needs, for one host or many.
#   launch/mpirun.sh -n 3 python -m mellmpi …                          on this machine
#   launch/mpirun.sh --hostfile hostfile -n 9 python -m mellmpi …      on the hosts of a file
# All arguments go to mpirun. Ranks = workers + 1: rank 0 schedules.
# MELLMPI_TIME_LIMIT=SECONDS ends a job that takes longer.
set -euo pipefail

command -v mpirun >/dev/null || {
  echo "mellmpi: no mpirun on the PATH. Type  . .venv/bin/activate  (after launch/quickstart.sh)," \
    "or load your site's MPI module" >&2
  exit 2
}

flags=()
case "$(mpirun --version 2>/dev/null)" in
  *"Open MPI"*\ 5.* | *prrte* | *"PMIx Reference RunTime"*)
    # ULFM: the job survives a lost worker. It needs the ob1 messaging layer (PML). Naming the byte
    # transfer layers (BTL) too cuts the start from 1.5 s to 0.2 s: no other fabric is probed.
    # On InfiniBand or Slingshot without ULFM:  MELLMPI_MCA="--mca pml ucx"
    read -ra transport <<<"${MELLMPI_MCA:---with-ft ulfm --mca pml ob1 --mca btl sm,self,tcp}"
    flags+=("${transport[@]}")
    # More ranks than cores are allowed: rank 0 mostly sleeps, and idle workers do not spin.
    flags+=(--map-by :OVERSUBSCRIBE --bind-to none)
    ;;
  *"Open MPI"*)  # 4.x: no ULFM
    flags+=(--oversubscribe --bind-to none)
    ;;
esac
# Open MPI refuses root without both variables; in a container root is often the only user.
if [[ $EUID -eq 0 ]]; then
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
# mellmpi sets the number of compute threads (--threads); libraries must not add their own.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

limit=()
[[ -z "${MELLMPI_TIME_LIMIT:-}" ]] || limit=(timeout --kill-after=10 "$MELLMPI_TIME_LIMIT")
exec "${limit[@]}" mpirun "${flags[@]}" "$@"
