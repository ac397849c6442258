"""FastWorker against BatchScheduler, step by step, on random histories of two workers."""

import random
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from mellmpi.config import BatchConfig, CacheConfig
from mellmpi.costs import CostModel
from mellmpi.protocol import (
    DATA_PLANE,
    GREEDY,
    SCHEDULER,
    Assign,
    KvReceived,
    ModelKv,
    Park,
    ReceiveKv,
    Release,
    Request,
    SendKv,
    StepReport,
    Unfreeze,
)
from mellmpi.sim import SimWorker, WorkerSpec
from mellmpi.sim.data_plane import DataPlane
from mellmpi.sim.fast import CountingExecutor, FastWorker
from mellmpi.sim.pace import Clock, Pace, Transfers

BLOCK_S = 7.0710678e-4  # not a multiple of a step
COST = CostModel(
    prefill_token_s=1e-4,
    step_s=1e-3,
    decode_token_s=1e-4,
    link_latency_s=0.0,
    link_Bps=64 / BLOCK_S,
)


class CountingWithArena(CountingExecutor):
    """With an arena, which the data plane reads."""

    def __init__(self, lengths, num_blocks):
        super().__init__(lengths)
        self.arena = np.zeros((num_blocks, 1), np.uint64)


class Log:
    """Messages of two workers; those of both kinds of workers must be equal."""

    def __init__(self):
        self.answers = []  # (time, worker, kind, fields)
        self.outputs = defaultdict(int)  # by epoch, reported so far
        self.preempted = []  # (worker, epoch), in order
        self.free = {}  # by worker, between two steps
        self.snapshots = []

    def add(self, now, worker, message):
        if isinstance(message, StepReport):
            runs = zip(message.epochs, message.firsts, message.counts, strict=True)
            for epoch, first, n in runs:
                self.outputs[epoch] = max(self.outputs[epoch], first + n)
            self.preempted += [(worker, epoch) for _, epoch in message.preempted]
        elif isinstance(message, KvReceived):
            self.outputs[message.epoch] = message.first + len(message.tokens)
            size = message.num_bytes, message.first, len(message.tokens)
            self.answers.append((round(now, 9), worker, "KvReceived", message.epoch, *size))
        else:
            epoch = getattr(message, "epoch", 0)
            self.answers.append((round(now, 9), worker, type(message).__name__, epoch))

    def snapshot(self, now, released):
        reported = {e: n for e, n in self.outputs.items() if n and e not in released}
        self.snapshots.append((now, reported, sorted(self.preempted), dict(self.free)))


class Stepped:
    """The loop of the real worker: messages between steps, a report after each."""

    def __init__(self, spec, lengths):
        self.clock, self.log = Clock(), Log()
        self.workers = {w: SimWorker(w, spec) for w in (1, 2)}
        self.plane = DataPlane(self.workers, lambda: BLOCK_S, self.later, self.block_result)
        self.lengths = lengths

    def later(self, delay_s, action):
        self.clock.at(self.clock.now + delay_s, action)

    def block_result(self, worker, event):
        self.write(worker.id, event, DATA_PLANE)

    def write(self, w, message, source=SCHEDULER):
        worker = self.workers[w]
        worker.inbox.append((source, message))
        if worker.plan is None:
            self.between_steps(worker)

    def between_steps(self, worker):
        while worker.inbox:
            for destination, command in worker.handle(*worker.inbox.pop(0)):
                self.send(worker, destination, command)
        self.report(worker)
        worker.plan = worker.batch.plan()
        if worker.plan is None:
            self.report(worker)
        else:
            sampled = sum(c.sampling is not None for c in worker.plan.chunks)
            positions = sum(len(c.tokens) for c in worker.plan.chunks)
            step_s = COST.forward_s(positions - sampled, sampled)
            self.later(step_s, lambda: self.stepped(worker, step_s))

    def report(self, worker):
        if (report := worker.report()) is not None:
            self.log.add(self.clock.now, worker.id, report)

    def stepped(self, worker, step_s):
        for destination, command in worker.finish_step(step_s):
            self.send(worker, destination, command)
        self.between_steps(worker)

    def send(self, worker, destination, command):
        if destination == DATA_PLANE:
            self.plane.handle(worker, command, self.clock.now)
        elif destination == SCHEDULER:
            self.log.add(self.clock.now, worker.id, command)
        else:
            self.write(destination, command, worker.id)

    def snapshot(self, released):
        for w, worker in self.workers.items():
            self.log.free[w] = worker.batch.free_bytes
            for epoch, sequence in worker.batch.sequences.items():
                self.log.outputs[epoch] = len(sequence.outputs)
        self.log.snapshot(self.clock.now, released)


class Fast:
    """The same on fast workers."""

    def __init__(self, spec, lengths):
        self.clock, self.log = Clock(), Log()
        self.paces = {}
        for w in (1, 2):
            worker = FastWorker(w, spec, COST, lengths)
            self.paces[w] = Pace(worker, self.clock, self.send, self.report)
        self.transfers = Transfers(self.clock, lambda n: n * BLOCK_S, self.deliver)

    def deliver(self, w, source, message):
        self.paces[w].write(source, message)

    def write(self, w, message):
        self.deliver(w, SCHEDULER, message)

    def send(self, pace, destination, command):
        if destination == DATA_PLANE:
            self.transfers.handle(pace.worker.id, command)
        elif destination == SCHEDULER:
            self.log.add(self.clock.now, pace.worker.id, command)
        else:
            self.deliver(destination, pace.worker.id, command)

    def report(self, pace):
        if (report := pace.worker.report()) is not None:
            self.log.add(self.clock.now, pace.worker.id, report)

    def snapshot(self, released):
        for w, pace in self.paces.items():
            pace.catch_up()
            self.log.free[w] = pace.worker.batch.free_bytes
            for epoch, sequence in pace.worker.batch.sequences.items():
                self.log.outputs[epoch] = len(sequence.outputs)
        self.log.snapshot(self.clock.now, released)


def history(seed, moves):
    """(spec, lengths by request, [(time, worker, message)], snapshot times, released epochs)."""
    rng = random.Random(seed)
    lengths, script, released, epoch = [], [], set(), 0
    size = rng.choice([1, 4, 16])
    names = rng.choice([("a",), ("a",), ("a", "b")])
    models = tuple(ModelKv(name, size << i, 64) for i, name in enumerate(names))
    limits = BatchConfig(
        max_num_seqs=rng.choice([2, 4, 64]), max_num_batched_tokens=rng.choice([64, 512])
    )
    num_blocks, cache = rng.choice([60, 200]) // size + 3, CacheConfig(block_size=size)

    def executor(num_blocks, models):
        return CountingWithArena(lengths, num_blocks)

    spec = WorkerSpec(models, num_blocks, limits, cache, 0.0, executor)
    for i in range(rng.randint(3, 12)):
        lengths.append(rng.randint(1, 60))
        prompt = (0,) * rng.randint(1, 40)
        sampling = replace(GREEDY, max_tokens=lengths[i], stop_token_ids=(1,))
        request = Request(i, rng.choice(names), prompt, sampling, None, 0, None)
        epoch, at_s, w = epoch + 1, rng.uniform(0, 0.2), rng.choice((1, 2))
        script.append((at_s, w, Assign(request, epoch, (0,) * rng.choice([0, 0, lengths[i] // 2]))))
        if rng.random() < 0.2:
            script.append((at_s + rng.uniform(0, 0.1), w, Release(i, epoch)))
            released.add(epoch)
        elif moves and rng.random() < 0.7:
            epoch, then_s = epoch + 1, at_s + rng.uniform(0, 0.05)
            reserve = ReceiveKv(request, epoch, w, 0, len(prompt) + rng.randint(0, 5), 0, ())
            script.append((then_s, 3 - w, reserve))
            sent_s = then_s + rng.uniform(1e-4, 0.01)
            script.append((sent_s, w, SendKv(i, epoch - 1, 3 - w, epoch, 0)))
            if rng.random() < 0.2:
                script.append((sent_s + rng.uniform(0, 0.02), 3 - w, Release(i, epoch)))
                script.append((sent_s + rng.uniform(0, 0.03), w, Unfreeze(i, epoch - 1)))
                released.add(epoch)
            else:
                script.append((sent_s + rng.uniform(0.05, 0.1), w, Release(i, epoch - 1)))
                released.add(epoch - 1)
    script += [(9.0, 1, Park()), (9.1, 2, Park())]
    snapshots_s = [*sorted(rng.uniform(0, 0.5) for _ in range(12)), 10.0]
    return spec, lengths, script, snapshots_s, released


def run(kind, seed, moves):
    spec, lengths, script, snapshots_s, released = history(seed, moves)
    cell = kind(spec, lengths)
    for at_s, w, message in script:
        cell.clock.at(at_s, lambda w=w, message=message: cell.write(w, message))
    for at_s in snapshots_s:
        cell.clock.at(at_s, lambda: cell.snapshot(released))
    while cell.clock.next():
        pass
    return cell.log


@pytest.mark.parametrize("moves", [False, True])
def test_a_fast_worker_sends_the_same_messages_at_the_same_times_as_a_stepped_one(moves):
    num_messages = defaultdict(int)
    for seed in range(150):
        slow, fast = run(Stepped, seed, moves), run(Fast, seed, moves)
        for a, b in zip(slow.snapshots, fast.snapshots, strict=True):
            assert a == b, f"seed {seed}"
        assert sorted(slow.answers) == sorted(fast.answers), f"seed {seed}"
        for _, _, name, *_ in slow.answers:
            num_messages[name] += 1
        num_messages["preempted"] += len(slow.preempted)
    assert num_messages["preempted"] > 20 and num_messages["Parked"] > 90
    least = min(num_messages[name] for name in ("KvReceived", "KvRefused"))
    assert not moves or least > 20, num_messages
