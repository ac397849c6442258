import sys

from mellmpi.transport.blocks import device_buffers_work, staging_buffer_for
from mellmpi.transport.blocks.staging import InPlace
from tests.mpi.harness import FLAGS, mpirun
from tests.transport.participant import HostArena


def test_the_probe_accepts_buffers_that_mpi_can_send():
    assert device_buffers_work("cpu", [mpirun(), *FLAGS])


def test_the_probe_rejects_buffers_that_mpi_cannot_send():
    assert not device_buffers_work("cuda:99", [mpirun(), *FLAGS])


def test_a_far_probe_uses_tcp_only(tmp_path):
    note = tmp_path / "note"
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(f"#!/bin/sh\necho $OMPI_MCA_btl >> {note}\necho device buffers work\n")
    mpirun.chmod(0o755)
    assert device_buffers_work("cpu", [str(mpirun)], far=True)
    assert note.read_text().split() == ["tcp,self"]


def test_a_probe_that_hangs_fails():
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert not device_buffers_work("cpu", sleeper, limit_s=0.2)


def test_a_probe_without_mpirun_fails():
    assert not device_buffers_work("cpu", ["/nowhere/mpirun"])


def test_host_memory_and_proven_device_memory_are_sent_in_place():
    arena = HostArena(1)
    assert isinstance(staging_buffer_for(arena, device_buffers=False), InPlace)
    arena.device = "cuda"
    assert isinstance(staging_buffer_for(arena, device_buffers=True), InPlace)
