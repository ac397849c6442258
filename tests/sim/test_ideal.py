"""The idealised workers against BatchScheduler with blocks of one token, all stepped together."""

import random

from mellmpi.config import BatchConfig, CacheConfig
from mellmpi.protocol import SCHEDULER, Assign, ModelKv, Release, Request, Sampling
from mellmpi.sim import SimWorker, WorkerSpec
from mellmpi.sim.fast import CountingExecutor
from mellmpi.sim.ideal import IdealWorkers

STEPS = 150
LIMITS = BatchConfig(max_num_seqs=1000, max_num_batched_tokens=10**6)


class Told:
    """What one kind of workers has reported, step by step."""

    def __init__(self):
        self.outputs, self.preempted, self.over = {}, [], set()

    def hear(self, report):
        runs = zip(report.epochs, report.firsts, report.counts, strict=True)
        for epoch, first, count in runs:
            if epoch not in self.over:
                self.outputs[epoch] = max(self.outputs.get(epoch, 0), first + count)
        self.preempted += [epoch for _, epoch in report.preempted]


def order(rng, request_id, epoch, length):
    prompt = (0,) * rng.randint(1, 30)
    sampling = Sampling(length, 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, (1,), None)
    request = Request(request_id, "m", prompt, sampling, None)
    return Assign(request, epoch, (0,) * rng.choice([0, 0, length // 2]))


def both(seed):
    """Two workers of each kind live through one history; yields what they say at every step."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 50) for _ in range(40)]
    kv, blocks = ModelKv("m", 1, 2), rng.choice([60, 150])
    ideal, ideally = IdealWorkers([(kv,)] * 2, 2 * blocks, 30.0, lengths), Told()
    spec = WorkerSpec(
        (kv,), blocks, LIMITS, CacheConfig(block_size=1), 0.0, lambda *_: CountingExecutor(lengths)
    )
    real, really = {w: SimWorker(w, spec) for w in (1, 2)}, Told()
    epoch = 0
    for step in range(STEPS):
        ideal.advance(step)
        for worker in real.values():
            if worker.plan is not None:
                worker.finish_step(1 / 30)
        for w in (1, 2):
            # Who does not fit goes at the end of a step there, before the next one here: what
            # comes in between would take sides.
            full = ideal.workers[w].preempted
            if not full and rng.random() < 0.15 and epoch < len(lengths):
                epoch += 1
                command = order(rng, epoch - 1, epoch, lengths[epoch - 1])
                ideal.handle(w, command)
                real[w].handle(SCHEDULER, command)
            elif not full and epoch and rng.random() < 0.03:
                command = Release(epoch - 1, epoch)
                ideal.handle(w, command)
                real[w].handle(SCHEDULER, command)
                for told in (ideally, really):  # nobody asks any more what it had
                    told.outputs.pop(epoch, None)
                    told.over.add(epoch)
        for w, worker in real.items():
            worker.plan = worker.batch.plan()
            for told, report in ((ideally, ideal.report(w)), (really, worker.report())):
                if report is not None:
                    told.hear(report)
        free = [2 * blocks - ideal.used(ideal.workers[w]) for w in (1, 2)]
        yield step, ideally, really, free, [worker.batch.free_bytes for worker in real.values()]


def test_ideal_workers_say_what_stepping_the_batch_scheduler_says_at_every_step():
    preempted = ended = 0
    for seed in range(120):
        for step, ideally, really, free, real_free in both(seed):
            assert ideally.outputs == really.outputs, f"seed {seed}, step {step}"
            assert ideally.preempted == really.preempted, f"seed {seed}, step {step}"
            assert free == real_free, f"seed {seed}, step {step}"
        preempted, ended = preempted + len(really.preempted), ended + len(really.outputs)
    assert preempted > 100 and ended > 1000
