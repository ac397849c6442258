"""mellmpi's worker loop (batch scheduler and engine) in one process, without MPI."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from answer import answer, channel

import mellmpi
from mellmpi.config import BatchConfig, CacheConfig, ModelConfig
from mellmpi.engine import Executor, build_executor
from mellmpi.protocol import GREEDY, SCHEDULER, Assign, Request
from mellmpi.worker import BatchScheduler


class Worker:
    """Runs a batch of requests to its end, as the worker does between messages."""

    def __init__(self, executor: Executor, batch: BatchConfig, cache: CacheConfig):
        self.executor, self.name = executor, executor.model_kv.model
        self.scheduler = BatchScheduler(executor.models, executor.arena.num_blocks, 0, batch, cache)
        self._epoch = 0

    def run(self, prompts: list[list[int]], num_out: int) -> list[list[int]]:
        first = self._epoch + 1
        sampling = replace(GREEDY, max_tokens=num_out)
        for prompt in prompts:
            self._epoch += 1
            request = Request(self._epoch, self.name, tuple(prompt), sampling, None, 0, None)
            self.scheduler.handle(SCHEDULER, Assign(request, self._epoch, ()))
        outputs = {i: [] for i in range(first, self._epoch + 1)}
        while self.scheduler.sequences:
            plan = self.scheduler.plan()
            self.scheduler.commit(plan, self.executor.execute(plan))
            self._collect(outputs)
        return list(outputs.values())

    def _collect(self, outputs: dict[int, list[int]]) -> None:
        report, end = self.scheduler.report(1, 0.0), 0
        if report is None:
            return
        assert not report.preempted, "the KV arena is too small for this load"
        for request_id, count in zip(report.request_ids, report.counts, strict=True):
            outputs[request_id] += report.tokens[end : end + count]
            end += count


def main() -> None:
    send = channel()
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-len", type=int, required=True)
    parser.add_argument("--max-requests", type=int, required=True)
    args = parser.parse_args()
    batch, cache = BatchConfig(max_num_seqs=args.max_requests), CacheConfig()
    executor = build_executor(
        args.model,
        ModelConfig(model=str(args.model)),
        cache,
        device="cpu",
        num_threads=args.threads,
    )
    worker = Worker(executor, batch, cache)
    model = type(executor.model).__name__
    answer(send, f"mellmpi {mellmpi.__version__} ({model}), torch {torch.__version__}", worker.run)


if __name__ == "__main__":
    main()
