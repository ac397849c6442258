import sys

from mellmpi.transport.blocks import device_buffers_work, lane_for
from mellmpi.transport.blocks.staging import InPlace
from tests.mpi.harness import FLAGS, mpirun
from tests.transport.conformance import HostArena


def test_the_probe_finds_buffers_that_mpi_can_take():
    assert device_buffers_work("cpu", [mpirun(), *FLAGS])


def test_the_probe_finds_buffers_that_mpi_cannot_take():
    assert not device_buffers_work("cuda:99", [mpirun(), *FLAGS])


def test_far_away_the_probe_may_not_use_what_a_host_shares(tmp_path):
    note = tmp_path / "note"
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(f"#!/bin/sh\necho $OMPI_MCA_btl >> {note}\necho device buffers work\n")
    mpirun.chmod(0o755)
    assert device_buffers_work("cpu", [str(mpirun)], far=True)
    assert note.read_text().split() == ["tcp,self"]


def test_a_probe_that_hangs_counts_as_no():
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert not device_buffers_work("cpu", sleeper, limit_s=0.2)


def test_a_probe_without_mpirun_counts_as_no():
    assert not device_buffers_work("cpu", ["/nowhere/mpirun"])


def test_host_memory_travels_in_place_and_device_memory_where_mpi_was_proven_to_take_it():
    arena = HostArena(1)
    assert isinstance(lane_for(arena, device_buffers=False), InPlace)
    arena.device = "cuda"
    assert isinstance(lane_for(arena, device_buffers=True), InPlace)
