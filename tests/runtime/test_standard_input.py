"""A descriptor that a shell opened as /dev/fd/N for mpirun is found in mpirun's process."""

import pytest

from mellmpi.config import UsageError
from mellmpi.runtime import standard_input
from mellmpi.runtime.standard_input import descriptor_path


def test_without_mpirun_names_of_descriptors_are_unchanged():
    for name in ("/dev/fd/63", "/proc/self/fd/11", "in.jsonl"):
        assert descriptor_path(name) == name


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """A /proc directory like mpirun's, with an inherited descriptor and one that mpirun opened."""
    (tmp_path / "fdinfo").mkdir()
    (tmp_path / "fdinfo" / "63").write_text("pos:\t0\nflags:\t0100000\n")
    (tmp_path / "fdinfo" / "7").write_text("pos:\t0\nflags:\t02100000\n")
    monkeypatch.setattr(standard_input, "_launcher", lambda: str(tmp_path))
    return tmp_path


def test_under_mpirun_a_descriptor_of_the_shell_is_found_in_mpirun(launcher):
    for name in ("/dev/fd/63", "/proc/self/fd/63"):
        assert descriptor_path(name) == f"{launcher}/fd/63"
    for name in ("in.jsonl", "/dev/fd/0", "/dev/fd/2", "/dev/stdin"):
        assert descriptor_path(name) == name


@pytest.mark.parametrize("number", [7, 99])
def test_a_descriptor_that_no_shell_opened_is_refused(launcher, number):
    with pytest.raises(UsageError, match=r"is not open in mpirun; .* cat FILE \| mpirun … -i -"):
        descriptor_path(f"/dev/fd/{number}")
