"""A cluster scheduler under the control of a test, and the invariants of its state."""

from dataclasses import replace
from typing import Any

from mellmpi.config import ClusterConfig
from mellmpi.protocol import (
    FRONT,
    GREEDY,
    KvReceived,
    KvReserved,
    ModelKv,
    Request,
    StepReport,
    Submit,
    WorkerReady,
)
from mellmpi.scheduler import ClusterScheduler, MoveProposal, View, WorkerState
from mellmpi.scheduler.policies import Policy
from mellmpi.scheduler.requests import Record, State
from mellmpi.scheduler.view import Proposal

KV = ModelKv("m", block_size=4, block_bytes=10)
NUM_BLOCKS, MAX_SEQS = 20, 8


def request(
    request_id: int,
    num_prompt: int = 3,
    max_tokens: int = 10,
    priority: int = 0,
    deadline_s: float | None = None,
    **sampling: Any,
) -> Request:
    """A greedy request; `sampling` replaces sampling parameters."""
    parameters = replace(GREEDY, max_tokens=max_tokens, **sampling)
    return Request(
        request_id, KV.model, tuple(range(num_prompt)), parameters, None, priority, deadline_s
    )


def report(
    *runs: tuple[int, int, int, tuple[int, ...]],
    acked: int = 0,
    free_blocks: int = 20,
    preempted: tuple[tuple[int, int], ...] = (),
    logprobs: Any = (),
    prompt_logprobs: Any = (),
    decode_tokens: int = 0,
) -> StepReport:
    """Runs are (request id, epoch, first, tokens)."""
    ids, epochs, firsts, tokens = zip(*runs, strict=True) if runs else ((), (), (), ())
    return StepReport(
        steps=1,
        step_s=0.01,
        prefill_tokens=0,
        decode_tokens=decode_tokens,
        free_bytes=free_blocks * KV.block_bytes,
        acked=acked,
        request_ids=ids,
        epochs=epochs,
        firsts=firsts,
        counts=tuple(map(len, tokens)),
        tokens=sum(tokens, ()),
        logprobs=logprobs,
        preempted=preempted,
        attended=0,
        cached=(),
        prompt_logprobs=prompt_logprobs,
    )


class Stage:
    """Places each request at `place_at` (None: nowhere); a tick enacts `proposals`, once."""

    def __init__(self, num_workers: int = 3):
        self.place_at: int | None = 1
        self.proposals: list[Proposal] = []
        self.place = lambda view, row: self.place_at
        policy = Policy(lambda view, row, model: self.place(view, row), self._rebalance)
        config = ClusterConfig(rebalance_every_s=1.0)
        self.scheduler = ClusterScheduler(num_workers, config, policy)
        self.now = 0.0
        for worker in range(1, num_workers + 1):
            self.ready(worker)

    def _rebalance(self, view: View) -> list[Proposal]:
        proposals, self.proposals = self.proposals, []
        return proposals

    def handle(self, source: Any, event: Any) -> list[tuple[Any, Any]]:
        """Handle one event, check the invariants, and return the commands."""
        self.now += 0.01
        commands = self.scheduler.handle(source, event, self.now)
        check(self.scheduler)
        return commands

    def tick(self, *proposals: Proposal) -> list[tuple[Any, Any]]:
        """Run a round in which the policy makes these proposals."""
        self.now += 1.0
        self.proposals = list(proposals)
        commands = self.scheduler.tick(self.now)
        check(self.scheduler)
        return commands

    def ready(self, worker: int, num_blocks: int = NUM_BLOCKS, acked: int = 0) -> Any:
        capacity = num_blocks * KV.block_bytes
        return self.handle(
            worker, WorkerReady((KV,), capacity, MAX_SEQS, acked, 0.5, 64, None, (), "")
        )

    def room(self, worker: int = 1) -> list[tuple[int, Any]]:
        """Let the worker report more room than before, so that the queue is placed."""
        self.handle(worker, report(free_blocks=NUM_BLOCKS - 1))
        return self.handle(worker, report())

    # --- a request in each state ----------------------------------------------------------------

    def waiting(self, request_id: int = 7, **kwargs: Any) -> Record:
        self.place_at, place_at = None, self.place_at
        self.handle(FRONT, Submit(request(request_id, **kwargs)))
        self.place_at = place_at
        return self.scheduler.records[request_id]

    def running(self, request_id: int = 7, tokens: tuple[int, ...] = (5,), **kwargs: Any) -> Record:
        """A request on worker `place_at`, with these tokens reported."""
        self.handle(FRONT, Submit(request(request_id, **kwargs)))
        record = self.scheduler.records[request_id]
        if tokens:
            self.handle(record.worker, report((request_id, record.epoch, 0, tokens)))
        return record

    def reserving(self, dst: int = 2, **kwargs: Any) -> Record:
        record = self.running(**kwargs)
        self.tick(MoveProposal(record.request.id, dst, "test", "transfer"))
        assert record.state is State.RESERVING
        return record

    def sending(self, dst: int = 2, **kwargs: Any) -> Record:
        record = self.reserving(dst, **kwargs)
        self.handle(dst, KvReserved(record.request.id, record.offer.epoch, record.offer.start))
        assert record.state is State.SENDING
        return record

    def state(self, record: Record) -> State | None:
        """The state of the request; None if it is no longer live."""
        return record.state if self.scheduler.records.get(record.request.id) is record else None


def received(record: Record, first: int = 0, tokens: tuple[int, ...] = (), **fields: Any) -> Any:
    """The destination's `KvReceived` for the current offer."""
    return KvReceived(
        record.request.id,
        record.offer.epoch,
        first,
        tokens,
        fields.get("logprobs", ()),
        fields.get("num_bytes", 20),
        fields.get("transfer_s", 0.1),
    )


def to_workers(commands: list[tuple[Any, Any]]) -> list[tuple[int, Any]]:
    """The commands that are sent to workers."""
    return [(to, command) for to, command in commands if isinstance(to, int)]


def of_type(commands: list[tuple[Any, Any]], kind: type) -> list[Any]:
    """Commands of one type, to any destination."""
    return [command for _, command in commands if isinstance(command, kind)]


# --- invariants ----------------------------------------------------------------------------------


def check(scheduler: ClusterScheduler) -> None:
    """Assert that records, columns, queue and ledger agree."""
    epochs = []
    for record in scheduler.records.values():
        _check_record(record)
        epochs += [e for e in (record.epoch, record.offer and record.offer.epoch) if e]
    assert len(epochs) == len(set(epochs)), "two assignments under one epoch"
    _check_columns(scheduler)
    _check_queue(scheduler)
    _check_ledger(scheduler)


def _check_record(record: Record) -> None:
    owned = record.worker is not None
    assert owned == (record.epoch is not None) == (record.state is not State.WAITING)
    assert (record.offer is not None) == (record.state in (State.RESERVING, State.SENDING))
    assert record.offer is None or record.offer.dst != record.worker
    assert record.moved_from is None or record.state is not State.WAITING


def _check_columns(scheduler: ClusterScheduler) -> None:
    columns = scheduler.registry.view.requests
    slots = {record.slot: record for record in scheduler.records.values()}
    assert set(columns.live.nonzero()[0]) == set(slots) and len(slots) == len(scheduler.records)
    assert not columns.worker[~columns.live].any() and not columns.movable[~columns.live].any()
    for slot, record in slots.items():
        assert columns.request_id[slot] == record.request.id
        assert columns.worker[slot] == (record.worker or 0)
        assert columns.movable[slot] == (record.state is State.RUNNING)
        assert columns.num_tokens[slot] == record.num_tokens


def _check_queue(scheduler: ClusterScheduler) -> None:
    queue = scheduler.queue
    waiting = {id for id, r in scheduler.records.items() if r.state is State.WAITING}
    assert set(queue._waiting) == waiting
    assert queue.kv_bytes == sum(w.kv_bytes for w in queue._waiting.values())
    pinned = {w.record.slot: w.pinned_to for w in queue._waiting.values()}
    registry = scheduler.registry
    for record in scheduler.records.values():
        assert registry.view.requests.pinned_to[record.slot] == pinned.get(record.slot, 0)
    for worker in range(len(registry.ledger.state)):
        assert registry.ledger.num_returning[worker] == len(queue.pinned_to(worker))


def _check_ledger(scheduler: ClusterScheduler) -> None:
    ledger = scheduler.registry.ledger
    expected = [0] * len(ledger.state)
    for record in scheduler.records.values():
        for worker in (record.worker, record.offer and record.offer.dst):
            if worker is not None:
                expected[worker] += 1
    assert ledger.num_requests.tolist() == expected
    unacked = [sum(size for _, size in orders) for orders in ledger._unacked]
    assert ledger.ordered.tolist() == unacked
    empty = (WorkerState.PARKED, WorkerState.LOST, WorkerState.PARKING, WorkerState.WAKING)
    assert all(expected[w] == 0 for state in empty for w in ledger.workers(state))


def assert_nothing_left(scheduler: ClusterScheduler) -> None:
    """Assert that no state of any request is left."""
    check(scheduler)
    assert not scheduler.records and not scheduler.queue
    assert not scheduler.registry.view.requests.live.any()
