#!/usr/bin/env bash
# Installs what the tests need into .venv and runs linters and all tests; arguments go to pytest.
#   bash launch/test.sh
#   bash launch/test.sh tests/scheduler -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
prepare_environment serve test clients
install_demo_weights
# One thread per process: tests start several processes, which would compete for the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ruff check . && ruff format --check .
# Not the numba kernels: mypy does not know their types.
mypy --follow-imports=silent --exclude engine/cpu/ mellmpi
python -m pytest "$@"
