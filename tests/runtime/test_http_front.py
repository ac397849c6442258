"""What rank 0 does with the questions and the deaths of API servers."""

import pytest

from mellmpi.protocol import Answer, Ask
from mellmpi.runtime.serving import front as module
from mellmpi.runtime.serving.front import RESTART_AFTER_S, HttpFront


class FakeServer:
    """An API server without a process."""

    index = 0

    def __init__(self, *_):
        self.received, self.sent, self.is_dead = [], [], False

    def receive(self):
        if self.is_dead:
            raise EOFError
        messages, self.received = self.received, []
        return messages

    def send(self, message):
        self.sent.append(message)

    def flush(self):
        pass

    def close(self):
        pass

    class process:
        returncode = -9


class Unchanged:
    """Settings that stay the same."""

    message = None

    def changed(self):
        return False


@pytest.fixture
def server():
    return FakeServer()


@pytest.fixture
def front(server):
    return HttpFront(None, [server], Unchanged())


def raises(error):
    def question():
        raise error

    return question


@pytest.mark.parametrize(
    ("what", "says"),
    [("known", "not now"), ("faulty", "an internal error"), ("unknown", "does not know 'unknown'")],
)
def test_an_error_in_an_answer_is_the_askers_alone(front, server, what, says):
    front.questions = {"known": raises(ValueError("not now")), "faulty": raises(KeyError("x"))}
    server.received = [Ask(7, what, "{}")]
    assert front.inbox(0.0) == []
    (answer,) = [message for message in server.sent if isinstance(message, Answer)]
    assert answer.id == 7 and says in answer.error and answer.body == ""


def test_a_server_that_cannot_be_started_is_tried_again(front, server, monkeypatch):
    def no_memory(*_):
        raise OSError("Cannot allocate memory")

    server.is_dead = True
    monkeypatch.setattr(module, "ApiServer", no_memory)
    assert front.inbox(10.0) == [] and front._servers == {}
    monkeypatch.setattr(module, "ApiServer", FakeServer)
    front.inbox(10.0 + RESTART_AFTER_S)
    assert front._servers.keys() == {0}
