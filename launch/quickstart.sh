#!/usr/bin/env bash
# From a fresh clone to live migration: environment, real weights, and a batch on two workers.
#   bash launch/quickstart.sh                        needs Python 3.11+, pip and a network, nothing else
#   MELLMPI_MPI=system bash launch/quickstart.sh     the site's own MPI (mpicc and mpirun on the PATH)
#   PYTHON=/path/to/python3.12 bash launch/quickstart.sh
# Run it again at any time: what is there is used. Answers and figures go to mellmpi-out/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
prepare_environment serve
install_demo_weights

mkdir -p mellmpi-out
rm -f mellmpi-out/answers.jsonl  # run-batch skips what is already answered; the demo starts anew
run_ranks 3 python -m mellmpi run-batch \
  -i mellmpi/front/demo_prompts.jsonl \
  -o mellmpi-out/answers.jsonl \
  --report mellmpi-out/report.json \
  --timeline mellmpi-out/timeline.png \
  --kv-cache-memory-bytes 40M \
  --request-rate 4 \
  --show 3 </dev/null

cat <<'NEXT'

Next:
  . .venv/bin/activate
  launch/mpirun.sh -n 3 python -m mellmpi run-batch -i YOURS.jsonl -o answers.jsonl --model DIR
  python -m mellmpi --help
NEXT
