"""IdealWorkers against BatchScheduler with blocks of one token, step by step."""

import random
from dataclasses import replace

from mellmpi.config import BatchConfig, CacheConfig
from mellmpi.protocol import GREEDY, SCHEDULER, Assign, ModelKv, Release, Request
from mellmpi.sim import SimWorker, WorkerSpec
from mellmpi.sim.fast import CountingExecutor
from mellmpi.sim.ideal import IdealWorkers

STEPS = 150
LIMITS = BatchConfig(max_num_seqs=1000, max_num_batched_tokens=10**6)


class Reported:
    """The sum of the reports of one kind of workers."""

    def __init__(self):
        self.outputs, self.preempted, self.released = {}, [], set()

    def add(self, report):
        runs = zip(report.epochs, report.firsts, report.counts, strict=True)
        for epoch, first, count in runs:
            if epoch not in self.released:
                self.outputs[epoch] = max(self.outputs.get(epoch, 0), first + count)
        self.preempted += [epoch for _, epoch in report.preempted]


def order(rng, request_id, epoch, length):
    prompt = (0,) * rng.randint(1, 30)
    sampling = replace(GREEDY, max_tokens=length, stop_token_ids=(1,))
    request = Request(request_id, "m", prompt, sampling, None, 0, None)
    return Assign(request, epoch, (0,) * rng.choice([0, 0, length // 2]))


def both(seed):
    """Runs one history on two workers of each kind; yields their reports after every step."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 50) for _ in range(40)]
    kv, blocks = ModelKv("m", 1, 2), rng.choice([60, 150])
    ideal, ideal_reported = IdealWorkers([(kv,)] * 2, 2 * blocks, 30.0, lengths), Reported()
    spec = WorkerSpec(
        (kv,), blocks, LIMITS, CacheConfig(block_size=1), 0.0, lambda *_: CountingExecutor(lengths)
    )
    real, real_reported = {w: SimWorker(w, spec) for w in (1, 2)}, Reported()
    epoch = 0
    for step in range(STEPS):
        ideal.advance(step)
        for worker in real.values():
            if worker.plan is not None:
                worker.finish_step(1 / 30)
        for w in (1, 2):
            # IdealWorkers preempt at the end of a step, BatchScheduler before the next one: a
            # message in between would have different effects.
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
                for reported in (ideal_reported, real_reported):
                    reported.outputs.pop(epoch, None)
                    reported.released.add(epoch)
        for w, worker in real.items():
            worker.plan = worker.batch.plan()
            for reported, report in (
                (ideal_reported, ideal.report(w)),
                (real_reported, worker.report()),
            ):
                if report is not None:
                    reported.add(report)
        free = [2 * blocks - ideal.workers[w].used(step) for w in (1, 2)]
        yield (
            step,
            ideal_reported,
            real_reported,
            free,
            [worker.batch.free_bytes for worker in real.values()],
        )


def test_ideal_workers_report_at_every_step_what_the_batch_scheduler_reports():
    preempted = ended = 0
    for seed in range(120):
        for step, ideal_reported, real_reported, free, real_free in both(seed):
            assert ideal_reported.outputs == real_reported.outputs, f"seed {seed}, step {step}"
            assert ideal_reported.preempted == real_reported.preempted, f"seed {seed}, step {step}"
            assert free == real_free, f"seed {seed}, step {step}"
        preempted, ended = (
            preempted + len(real_reported.preempted),
            ended + len(real_reported.outputs),
        )
    assert preempted > 100 and ended > 1000
