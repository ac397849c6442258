"""A minimal batch scheduler, and requests for it."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from mellmpi.config import BatchConfig, CacheConfig
from mellmpi.protocol import SCHEDULER, Assign, Chunk, Sampling, StepPlan
from mellmpi.worker import BatchScheduler


@dataclass
class LiveRequest:
    """A request with its outputs, block table and number of computed tokens."""

    prompt: tuple[int, ...]
    sampling: Sampling
    outputs: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    table: list[int] = field(default_factory=list)
    num_computed: int = 0

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.outputs]


class ChunkScheduler:
    """A minimal batch scheduler: chunks of at most `limit` tokens, blocks in a random order."""

    def __init__(self, executor, limit=1000, seed=0):
        self.executor, self.limit = executor, limit
        generator = torch.Generator().manual_seed(seed)
        self.free = torch.randperm(executor.arena.num_blocks, generator=generator).tolist()

    def _chunk(self, live: LiveRequest) -> Chunk:
        tokens, start = live.tokens, live.num_computed
        end = min(len(tokens), start + self.limit)
        live.table += [self.free.pop() for _ in range(self._blocks(end) - len(live.table))]
        sampling = live.sampling if end == len(tokens) else None
        history = (live.prompt, live.outputs)
        return Chunk(id(live), start, tuple(tokens[start:end]), live.table, sampling, history)

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.executor.arena.block_size)

    def step(self, lives: list[LiveRequest]) -> None:
        pairs = [(live, self._chunk(live)) for live in lives]
        pairs.sort(key=lambda pair: pair[1].sampling is None)
        result = self.executor.execute(StepPlan("m", tuple(chunk for _, chunk in pairs), ()))
        for live, chunk in pairs:
            live.num_computed += len(chunk.tokens)
        for (live, _), token, logprob in zip(pairs, result.tokens, result.logprobs, strict=False):
            live.outputs.append(token)
            live.logprobs.append(logprob)

    def run(self, lives: list[LiveRequest], until: int) -> list[list[int]]:
        while any(active := [live for live in lives if len(live.outputs) < until]):
            self.step(active)
        return [live.outputs for live in lives]

    def receive(self, live: LiveRequest, source: "ChunkScheduler") -> None:
        """Migrate a request by transfer: copy the bytes of its blocks to blocks with other ids."""
        assert self.executor.fingerprint == source.executor.fingerprint
        theirs, live.table = live.table, [self.free.pop() for _ in live.table]
        for old, new in zip(theirs, live.table, strict=True):
            self.executor.arena.block(new).copy_(source.executor.arena.block(old))
        source.free += theirs


class Rank0:
    """Assigns requests to one worker, logs its reports and resumes what it preempts."""

    def __init__(self, executor, num_blocks=200, num_tokens=64, prefix_caching=False):
        limits = BatchConfig(max_num_seqs=min(8, num_tokens), max_num_batched_tokens=num_tokens)
        cache = CacheConfig(enable_prefix_caching=prefix_caching)
        self.executor = executor
        self.batch = BatchScheduler(executor.models, num_blocks, 0, limits, cache)
        self.requests, self.outputs, self.scored = {}, {}, {}
        self.num_preempted = self.num_steps = self.epoch = 0

    def run(self, requests):
        """Compute these requests together. Returns their prompts' logprobs by request id."""
        for request in requests:
            self.requests[request.id], self.outputs[request.id] = request, []
            self.assign(request.id)
        while (plan := self.batch.plan()) is not None:
            self.batch.commit(plan, self.executor.execute(plan))
            self.num_steps += 1
            if (report := self.batch.report(1, 0.1)) is not None:
                self.take(report)
        return {r.id: self.scored.pop(r.id, None) for r in requests}

    def assign(self, request_id):
        self.epoch += 1
        known = tuple(self.outputs[request_id])
        order = Assign(self.requests[request_id], self.epoch, known)
        self.batch.handle(SCHEDULER, order)

    def take(self, report):
        tokens, prompt_logprobs = list(report.tokens), dict(report.prompt_logprobs)
        for run, (request_id, count) in enumerate(
            zip(report.request_ids, report.counts, strict=True)
        ):
            self.outputs[request_id] += [tokens.pop(0) for _ in range(count)]
            if run in prompt_logprobs:
                assert request_id not in self.scored, "logprobs of a prompt reported twice"
                assert report.firsts[run] == 0
                self.scored[request_id] = prompt_logprobs[run]
        for request_id, _ in report.preempted:
            self.num_preempted += 1
            self.assign(request_id)


def random_prompts(num, seed=0, longest=40, vocab=131):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, num)
    return [tuple(rng.integers(0, vocab, n).tolist()) for n in lengths]


def mixed_requests(greedy, num=12):
    kinds = [
        {},
        dict(temperature=0.8),
        dict(temperature=1.2, top_p=0.9, top_k=30),
        dict(temperature=1.0, repetition_penalty=1.4, min_p=0.02),
        dict(frequency_penalty=0.6),
    ]
    return [
        LiveRequest(prompt, replace(greedy, seed=i, **kinds[i % len(kinds)]))
        for i, prompt in enumerate(random_prompts(num))
    ]
