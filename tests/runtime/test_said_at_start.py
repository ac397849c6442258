from tests.runtime.jobs import TINY, Run, write_requests


def test_the_path_of_blocks_and_the_links_are_logged_once(tmp_path):
    write_requests(tmp_path / "in", 2, longest=30)
    files = ("-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"))
    done = Run(4, "run-batch", *files, *TINY, "--device", "cpu", directory=tmp_path).wait()
    assert done.code == 0, done.err
    assert done.err.count("in place, checksums auto") == 1
    assert done.err.count("host 0 to host 0: ") == 1
