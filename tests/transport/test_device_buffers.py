"""The test program for device buffers, run on the CPU: it must detect wrong contents."""

import sys

import pytest

from mellmpi.transport.blocks import device_buffers_work
from mellmpi.transport.probes import device_buffers as device_probe
from tests.mpi.harness import FLAGS, ROOT, mpirun

CHANGED = """
import sys, runpy
from mellmpi.transport.mpi import job as mpi
send = mpi.MpiChannel.send
def changed(self, address, num_bytes, dst, tag):
    return send(self, address {change}, num_bytes, dst, tag)
mpi.MpiChannel.send = changed
sys.argv = ["probe", "cpu"]
runpy.run_module("mellmpi.transport.probes.device_buffers", run_name="__main__")
"""


def buffers_work(tmp_path, change):
    """The verdict of the probe on an MPI that changes the send address."""
    (tmp_path / "python").write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path}/changed.py\n")
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "changed.py").write_text(CHANGED.format(change=change))
    flags = f"{' '.join(FLAGS)} -x PYTHONPATH={ROOT} -n 2"
    (tmp_path / "mpirun").write_text(f"#!/bin/sh\nexec {mpirun()} {flags} {tmp_path}/python\n")
    (tmp_path / "mpirun").chmod(0o755)
    return device_buffers_work("cpu", [str(tmp_path / "mpirun")])


def test_the_probe_compares_contents(tmp_path):
    assert buffers_work(tmp_path, "")
    assert not buffers_work(tmp_path, "+ (num_bytes > 300_000)")


def test_all_messages_of_all_ranks_differ():
    ours, theirs = device_probe.pattern(0), device_probe.pattern(1)
    parts = [p for pattern in (ours, theirs) for p in pattern.split(list(device_probe.SIZES))]
    heads = {tuple(part[:64].tolist()) for part in parts}
    assert len(heads) == len(parts) and all(part[:64].any() for part in parts)


@pytest.mark.parametrize("name, rank, index", [("cuda:0", 1, 1), ("cuda:3", 1, 0), ("cuda", 0, 0)])
def test_the_second_rank_takes_the_next_gpu(monkeypatch, name, rank, index):
    monkeypatch.setattr(device_probe.torch.cuda, "device_count", lambda: 4)
    assert device_probe.own_device(name, rank).index == index
    assert device_probe.own_device("cpu", rank).type == "cpu"
