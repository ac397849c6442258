import pytest

from mellmpi.runtime.gpus import GpuAssignment


def test_workers_of_a_host_take_its_gpus_round_robin():
    assert [GpuAssignment(i, 4, 2).device for i in range(4)] == [
        "cuda:0",
        "cuda:1",
        "cuda:0",
        "cuda:1",
    ]
    assert GpuAssignment(0, 4, 0).device == "cpu"


def test_the_scheduler_takes_no_gpu():
    assert GpuAssignment.of(1, [0, 1, 2], 2) == GpuAssignment(0, 2, 2)
    assert GpuAssignment.of(5, [3, 4, 5], 2) == GpuAssignment(2, 3, 2)


@pytest.mark.parametrize(
    ("index", "neighbours", "gpus", "sharers"),
    [(0, 3, 2, 2), (1, 3, 2, 1), (2, 3, 2, 2), (0, 5, 1, 5), (0, 1, 4, 1), (1, 2, 0, 1)],
)
def test_the_number_of_workers_that_share_a_gpu(index, neighbours, gpus, sharers):
    assert GpuAssignment(index, neighbours, gpus).sharers == sharers


def test_more_workers_than_gpus_are_refused_with_what_to_type_instead():
    problem = GpuAssignment(0, 3, 2).problem("node7", oversubscribe=False)
    assert "node7" in problem and "-np 3" in problem and "--oversubscribe-gpus" in problem
    assert not GpuAssignment(0, 3, 2).problem("node7", oversubscribe=True)
    assert not GpuAssignment(0, 2, 2).problem("node7", oversubscribe=False)
    assert not GpuAssignment(0, 9, 0).problem("node7", oversubscribe=False)
