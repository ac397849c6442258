from tests.runtime.jobs import TINY, Run, write_requests


def test_how_blocks_travel_and_how_fast_is_said_once_at_the_start(tmp_path):
    write_requests(tmp_path / "in", 2, longest=30)
    files = ("-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"))
    done = Run(4, "run-batch", *files, *TINY, "--device", "cpu", directory=tmp_path).wait()
    assert done.code == 0, done.err
    assert done.err.count("in place, checksums auto") == 1
    assert done.err.count("host 0 to host 0: ") == 1
