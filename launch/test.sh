#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them all; arguments go to pytest.
#   bash launch/test.sh
#   bash launch/test.sh tests/core -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
prepare_environment serve test
install_demo_weights
# One thread a process: tests start several, and would fight over the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ruff check . && ruff format --check .
mypy mellmpi/core mellmpi/protocol.py mellmpi/config.py
python -m pytest "$@"
