"""Collective calls made of messages, and the end of every wait when another rank fails."""

import threading
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor

import pytest

from mellmpi.protocol import Cancel, GatherPart, RankFailed, WorkerLost, encode
from mellmpi.transport import ControlPlane, PeerFailed, control_plane
from tests.transport.fakes import FakeChannel

SIZE = 3


class Exited(BaseException):
    """A rank has ended its process."""


class Network:
    """Channels of some ranks; each rank is a thread."""

    def __init__(self, size=SIZE):
        self._lock = threading.Lock()
        self._queues = defaultdict(deque)
        self.dead = set()
        self.exit_codes = {}
        self.controls = [
            ControlPlane(rank, size, Wire(self, rank), self._leave(rank)) for rank in range(size)
        ]

    def _leave(self, rank):
        def leave(exit_code):
            self.exit_codes[rank] = exit_code
            raise Exited

        return leave

    def put(self, src, dst, data):
        with self._lock:
            self._queues[dst].append((src, data))

    def get(self, dst):
        with self._lock:
            return self._queues[dst].popleft() if self._queues[dst] else None

    def on_all(self, call):
        """Make this call on every living rank at once. Returns results or exceptions, by rank."""

        def one(control):
            try:
                return call(control)
            except (PeerFailed, Exited) as error:
                return error

        living = [control for control in self.controls if control.rank not in self.dead]
        with ThreadPoolExecutor(len(living)) as pool:
            return dict(zip([c.rank for c in living], pool.map(one, living), strict=True))


class Wire:
    """The channel of one rank."""

    error = None

    def __init__(self, network, rank):
        self._network, self._rank, self._known = network, rank, set()

    def send_bytes(self, data, dst):
        self._network.put(self._rank, dst, data)

    def take(self):
        found = self._network.get(self._rank)
        return found and (found[0], bytearray(found[1]), None)

    def test(self, request):
        return True

    def newly_failed(self):
        new = self._network.dead - self._known
        self._known |= new
        return sorted(new)


@pytest.fixture
def network(monkeypatch):
    monkeypatch.setattr(control_plane, "ANSWER_S", 0.2)
    return Network()


def test_a_gather_gives_every_rank_the_data_of_all_ranks_by_rank(network):
    for data in (b"a", b"bc", b""):
        parts = [data * (rank + 1) for rank in range(SIZE)]
        seen = network.on_all(lambda control, data=data: control.gather(data * (control.rank + 1)))
        assert list(seen.values()) == [parts] * SIZE


def test_a_rank_may_be_a_gather_ahead_and_send_messages_meanwhile(network):
    def call(control):
        if control.rank == 1:
            control.send(2, Cancel(7, "gone"))
        parts = control.gather(b"x"), control.gather(b"y")
        return parts, control.poll()

    seen = network.on_all(call)
    assert all(parts == ([b"x"] * SIZE, [b"y"] * SIZE) for parts, _ in seen.values())
    assert seen[2][1] == [(1, Cancel(7, "gone"))]


def test_rank_0_broadcasts_plain_data(network):
    data = {"config": {"threads": None}, "names": ["a"]}
    seen = network.on_all(lambda control: control.share(data if control.rank == 0 else None))
    assert list(seen.values()) == [data] * SIZE


def test_a_rank_that_fails_ends_the_gather_of_all_others_with_its_exit_code(network):
    def call(control):
        if control.rank == 1:
            control.report_failure(2, "no such file")
            control.await_termination()
        try:
            control.gather(b"")
        except PeerFailed as error:
            assert control.rank == 0 and (error.exit_code, error.text) == (2, "no such file")
            return control.terminate_others(error.exit_code)

    assert network.on_all(call)[0] is True, "all ranks have confirmed"
    assert network.exit_codes == {1: 2, 2: 2}


def test_a_rank_that_died_ends_the_gather_at_rank_0_which_ends_the_others(network):
    network.dead.add(2)

    def call(control):
        try:
            control.gather(b"")
        except PeerFailed as error:
            assert control.rank == 0 and "rank 2 has died" in error.text
            return control.terminate_others(error.exit_code)

    assert network.on_all(call)[0] is True
    assert network.exit_codes == {1: 1}


def test_the_death_of_rank_0_ends_the_gather_everywhere(network):
    network.dead.add(0)
    seen = network.on_all(lambda control: control.gather(b""))
    assert all(isinstance(error, PeerFailed) and error.exit_code == 1 for error in seen.values())


def test_at_the_end_of_a_job_any_loss_ends_the_gather_everywhere(network):
    network.dead.add(2)
    for control in network.controls:
        control.starting = False
    seen = network.on_all(lambda control: control.gather(b""))
    assert seen.keys() == {0, 1} and all(isinstance(e, PeerFailed) for e in seen.values())


def test_rank_0_notices_that_ranks_do_not_confirm_their_termination(network):
    assert network.controls[0].terminate_others(1) is False


def test_a_rank_does_not_wait_for_termination_by_a_dead_rank_0(network, monkeypatch):
    monkeypatch.setattr(control_plane, "ANSWER_S", 1e6)
    network.dead.add(0)
    network.controls[1].await_termination()


def test_a_worker_failure_while_the_job_serves_is_a_message():
    channel = FakeChannel()
    control = ControlPlane(0, 3, channel)
    control.starting = False
    channel.inbox.append((2, encode(RankFailed(1, "out of memory"))))
    assert control.receive() and control.poll() == [(2, RankFailed(1, "out of memory"))]


@pytest.mark.parametrize(("starting", "exit_code"), [(True, 1), (True, 2), (False, 2)])
def test_a_fault_at_the_start_and_a_users_mistake_at_any_time_end_the_job(starting, exit_code):
    channel = FakeChannel()
    control = ControlPlane(0, 3, channel)
    control.starting = starting
    channel.inbox.append((2, encode(RankFailed(exit_code, "why"))))
    with pytest.raises(PeerFailed, match="why"):
        control.receive()


def test_poll_does_not_return_parts_of_a_gather():
    channel = FakeChannel()
    control = ControlPlane(0, 3, channel)
    channel.inbox.append((2, encode(GatherPart(b""))))
    assert not control.receive() and control.poll() == []


def test_lost_ranks_are_not_terminated():
    channel = FakeChannel()
    channel.failures = [2]
    control = ControlPlane(1, 4, channel)
    control.receive()
    assert control.poll() == [(2, WorkerLost(2))]
    channel.failures = [0, 3]
    assert control.terminate_others(1)
    assert {request.peer for request in channel.requests} == {0, 3}


def test_file_names_that_are_not_utf_8_can_be_broadcast(network):
    name = b"mod\xe9le".decode("utf-8", "surrogateescape")
    seen = network.on_all(lambda control: control.share([name] if control.rank == 0 else None))
    assert list(seen.values()) == [[name]] * SIZE
