"""Gathers made of messages, and how every wait of a rank ends when another rank fails."""

import threading
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor

import pytest

from mellmpi.protocol import Cancel, GatherPart, RankFailed, WorkerLost, encode
from mellmpi.transport import PeerFailed, Post
from mellmpi.transport import post as post_module
from tests.transport.fakes import FakeChannel

SIZE = 3


class Left(BaseException):
    """A rank has ended its process."""


class Network:
    """Channels of some ranks, each used by a thread of its own."""

    def __init__(self, size=SIZE):
        self._lock = threading.Lock()
        self._queues = defaultdict(deque)
        self.dead = set()
        self.exit_codes = {}
        self.posts = [Post(rank, size, Wire(self, rank), self._leave(rank)) for rank in range(size)]

    def _leave(self, rank):
        def leave(exit_code):
            self.exit_codes[rank] = exit_code
            raise Left

        return leave

    def put(self, src, dst, data):
        with self._lock:
            self._queues[dst].append((src, data))

    def get(self, dst):
        with self._lock:
            return self._queues[dst].popleft() if self._queues[dst] else None

    def on_all(self, call):
        """`call(post)` on every living rank at once; results, or what was raised, by rank."""

        def one(post):
            try:
                return call(post)
            except (PeerFailed, Left) as error:
                return error

        living = [post for post in self.posts if post.rank not in self.dead]
        with ThreadPoolExecutor(len(living)) as pool:
            return dict(zip([p.rank for p in living], pool.map(one, living), strict=True))


class Wire:
    """One rank's channel for messages."""

    error = None

    def __init__(self, network, rank):
        self._network, self._rank, self._known = network, rank, set()

    def send_bytes(self, data, dst):
        self._network.put(self._rank, dst, data)

    def take(self):
        came = self._network.get(self._rank)
        return came and (came[0], bytearray(came[1]), None)

    def test(self, request):
        return True

    def newly_failed(self):
        new = self._network.dead - self._known
        self._known |= new
        return sorted(new)


@pytest.fixture
def network(monkeypatch):
    monkeypatch.setattr(post_module, "ANSWER_S", 0.2)
    return Network()


def test_a_gather_gives_every_rank_the_data_of_all_ranks_by_rank(network):
    for turn in (b"a", b"bc", b""):
        parts = [turn * (rank + 1) for rank in range(SIZE)]
        seen = network.on_all(lambda post, turn=turn: post.gather(turn * (post.rank + 1)))
        assert list(seen.values()) == [parts] * SIZE


def test_a_rank_may_be_a_gather_ahead_and_send_messages_meanwhile(network):
    def call(post):
        if post.rank == 1:
            post.send(2, Cancel(7, "gone"))
        parts = post.gather(b"x"), post.gather(b"y")
        return parts, post.poll()

    seen = network.on_all(call)
    assert all(parts == ([b"x"] * SIZE, [b"y"] * SIZE) for parts, _ in seen.values())
    assert seen[2][1] == [(1, Cancel(7, "gone"))]


def test_rank_0_shares_plain_data(network):
    data = {"config": {"threads": None}, "names": ["a"]}
    seen = network.on_all(lambda post: post.share(data if post.rank == 0 else None))
    assert list(seen.values()) == [data] * SIZE


def test_a_rank_that_fails_ends_the_gather_of_all_others_with_its_exit_code(network):
    def call(post):
        if post.rank == 1:
            post.report_failure(2, "no such file")
            post.await_dismissal()
        try:
            post.gather(b"")
        except PeerFailed as error:
            assert post.rank == 0 and (error.exit_code, error.text) == (2, "no such file")
            return post.dismiss(error.exit_code)

    assert network.on_all(call)[0] is True, "rank 0 knows that all ranks have left"
    assert network.exit_codes == {1: 2, 2: 2}


def test_a_rank_that_died_ends_the_gather_at_rank_0_which_ends_the_others(network):
    network.dead.add(2)

    def call(post):
        try:
            post.gather(b"")
        except PeerFailed as error:
            assert post.rank == 0 and "rank 2 has died" in error.text
            return post.dismiss(error.exit_code)

    assert network.on_all(call)[0] is True
    assert network.exit_codes == {1: 1}


def test_the_death_of_rank_0_ends_the_gather_everywhere(network):
    network.dead.add(0)
    seen = network.on_all(lambda post: post.gather(b""))
    assert all(isinstance(error, PeerFailed) and error.exit_code == 1 for error in seen.values())


def test_at_the_end_of_a_job_any_loss_ends_the_gather_everywhere(network):
    network.dead.add(2)
    for post in network.posts:
        post.starting = False
    seen = network.on_all(lambda post: post.gather(b""))
    assert seen.keys() == {0, 1} and all(isinstance(e, PeerFailed) for e in seen.values())


def test_rank_0_knows_which_ranks_do_not_answer_a_dismissal(network):
    assert network.posts[0].dismiss(1) is False


def test_a_rank_whose_rank_0_has_died_does_not_wait_to_be_dismissed(network, monkeypatch):
    monkeypatch.setattr(post_module, "ANSWER_S", 1e6)
    network.dead.add(0)
    network.posts[1].await_dismissal()


def test_a_worker_that_fails_while_the_job_serves_is_an_event():
    channel = FakeChannel()
    post = Post(0, 3, channel)
    post.starting = False
    channel.inbox.append((2, encode(RankFailed(1, "out of memory"))))
    assert post.look() and post.poll() == [(2, RankFailed(1, "out of memory"))]


@pytest.mark.parametrize(("starting", "exit_code"), [(True, 1), (True, 2), (False, 2)])
def test_a_fault_at_the_start_and_a_users_mistake_at_any_time_end_the_job(starting, exit_code):
    channel = FakeChannel()
    post = Post(0, 3, channel)
    post.starting = starting
    channel.inbox.append((2, encode(RankFailed(exit_code, "why"))))
    with pytest.raises(PeerFailed, match="why"):
        post.look()


def test_parts_of_a_gather_are_no_messages():
    channel = FakeChannel()
    post = Post(0, 3, channel)
    channel.inbox.append((2, encode(GatherPart(b""))))
    assert not post.look() and post.poll() == []


def test_nobody_who_is_lost_is_dismissed():
    channel = FakeChannel()
    channel.failures = [2]
    post = Post(1, 4, channel)
    post.look()
    assert post.poll() == [(2, WorkerLost(2))]
    channel.failures = [0, 3]
    assert post.dismiss(1)
    assert {request.peer for request in channel.requests} == {0, 3}


def test_names_of_files_that_are_no_text_can_be_shared(network):
    name = b"mod\xe9le".decode("utf-8", "surrogateescape")
    seen = network.on_all(lambda post: post.share([name] if post.rank == 0 else None))
    assert list(seen.values()) == [[name]] * SIZE
