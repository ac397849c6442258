#!/usr/bin/env bash
# From a fresh clone to live migration: environment, real weights, a batch on two workers.
#   bash launch/quickstart.sh                        needs Python 3.11+, pip and a network, nothing else
#   MELLMPI_MPI=system bash launch/quickstart.sh     the site's own MPI (mpicc and mpirun on the PATH)
#   PYTHON=/path/to/python3.12 bash launch/quickstart.sh
# A second run uses what is installed. Answers and figures go to mellmpi-out/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
prepare_environment serve
install_demo_weights

mkdir -p mellmpi-out
rm -f mellmpi-out/answers.jsonl  # else the demo would skip the requests answered there
run_ranks 3 python -m mellmpi demo \
  -o mellmpi-out/answers.jsonl \
  --report mellmpi-out/report.json \
  --timeline mellmpi-out/timeline.png </dev/null

cat <<'NEXT'
In this shell first:  . .venv/bin/activate
NEXT
