"""`top` in a terminal of its own: it draws again, ends on q and Ctrl-C, and survives a restart."""

import os
import pty
import select
import signal
import subprocess
import sys
import termios

import pytest

from mellmpi.cli import main
from tests.page.server import FakeServer
from tests.page.snapshots import TWO, cluster, segment, worker

PATIENCE_S = 30


class Terminal:
    """`python -m mellmpi top` with a pseudo-terminal."""

    def __init__(self, url, *arguments):
        self.master, self._slave = pty.openpty()
        termios.tcsetwinsize(self._slave, (30, 110))
        self.before = termios.tcgetattr(self._slave)
        command = [sys.executable, "-m", "mellmpi", "top", "--url", url, *arguments]
        ends = dict.fromkeys(("stdin", "stdout", "stderr"), self._slave)
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
        self.process = subprocess.Popen(
            command, **ends, env=environment, start_new_session=True, preexec_fn=_own_terminal
        )
        self.text = ""

    def until(self, word):
        """Read until the terminal has shown this word, and forget what it has shown before."""
        while word not in self.text:
            ready, _, _ = select.select([self.master], [], [], PATIENCE_S)
            assert ready, f"{word!r} is not in {self.text[-2000:]!r}"
            self.text += os.read(self.master, 65536).decode("utf-8", "replace")
        self.text = self.text.partition(word)[2]

    def type(self, keys):
        os.write(self.master, keys)

    def end(self):
        """The exit code; the terminal must be as it was before."""
        code = self.process.wait(PATIENCE_S)
        assert termios.tcgetattr(self._slave)[3] == self.before[3], "keys are no longer echoed"
        return code

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self._slave)


def _own_terminal():
    import fcntl

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job of a shell ignores it

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal


@pytest.fixture
def terminals():
    opened = []

    def start(*arguments):
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


class Shown:
    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


def uptime(seconds):
    return TWO | {"uptime_s": seconds}


@pytest.mark.parametrize("key", [b"q", b"Q", b"\x03", b"\x04"])
def test_it_draws_again_until_a_key_ends_it(terminals, key):
    shown = Shown(uptime(41.0))
    with FakeServer(shown) as server:
        server.period_s = 0.02
        terminal = terminals(server.url)
        terminal.until("up 41 s")
        shown.now = uptime(42.0)
        terminal.until("up 42 s")
        terminal.type(b"x")  # means nothing
        shown.now = uptime(43.0)
        terminal.until("up 43 s")
        terminal.type(key)
        assert terminal.end() == 0


def test_it_waits_for_a_server_that_restarts(terminals):
    shown = Shown(uptime(41.0))
    with FakeServer(shown) as server:
        server.period_s, port = 0.02, server.port
        terminal = terminals(server.url)
        terminal.until("up 41 s")
    terminal.until("waiting for it")
    shown.now = uptime(3.0)
    with FakeServer(shown, port=port):
        terminal.until("up 3.0 s")
        terminal.type(b"q")
        assert terminal.end() == 0


def test_a_key_that_is_no_longer_accepted_ends_it(terminals):
    with FakeServer(Shown(TWO), key="old") as server:
        server.period_s, port = 0.02, server.port
        terminal = terminals(server.url, "--api-key", "old")
        terminal.until("live")
    with FakeServer(Shown(TWO), port=port, key="new"):
        terminal.until("does not accept this key")
        assert terminal.end() == 2


def test_once_prints_once(terminals):
    with FakeServer(Shown(TWO)) as server:
        terminal = terminals(server.url, "--once")
        terminal.until("No request has moved yet.")
        assert terminal.end() == 0


def test_without_a_terminal_it_prints_once_without_colours(capsys):
    with FakeServer(Shown(cluster(worker(1, segment(5, 500))))) as server:
        assert main(["top", "--url", server.url]) == 0
    text = capsys.readouterr().out
    assert "1 active          50%" in text and "\x1b" not in text


def test_it_starts_without_torch_numpy_and_mpi():
    with FakeServer(Shown(TWO)) as server:
        blocked = dict.fromkeys(("torch", "numpy", "mpi4py", "tqdm"))
        code = (
            f"import sys; sys.modules.update({blocked}); from mellmpi.cli import main; "
            f"sys.exit(main(['top', '--url', {server.url!r}]))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
