import json
import subprocess
import sys

from tests.mpi.harness import ROOT

PROGRAM = """
import json
from types import SimpleNamespace
from mellmpi.transport.mpi.job import MpiJob
job = SimpleNamespace(size=4, local_ranks=[0, 1])
kinds = "auto", "always", "never"
print(json.dumps({kind: sorted(MpiJob._checked(job, kind)) for kind in kinds}))
"""


def test_checksums_are_used_between_hosts_or_everywhere_or_nowhere():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"auto": [2, 3], "always": [0, 1, 2, 3], "never": []}
