"""What a migration may change in an answer, in both dtypes and with both model classes.

docs/design.md states the guarantees. A request is computed on one executor, migrated in each of the
three ways, and continues in another batch over other blocks.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from mellmpi.engine import Executor, KvArena, KvGeometry, pack
from mellmpi.engine.executor import with_layout
from mellmpi.protocol import Chunk, StepPlan
from tests.engine.conftest import MAKERS
from tests.engine.decoding import ChunkScheduler, LiveRequest, mixed_requests, random_prompts

SIZE, VOCABULARY = 16, 131
BEFORE, AFTER = 5, 14  # outputs at the migration, and at the end


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def make_scheduler(get_twin):
    """(model class, dtype) -> a scheduler over its own model and an empty arena."""

    def build(kind, dtype, limit=1000, seed=0):
        twin = get_twin("llama", dtype)
        model = MAKERS[kind](twin.arch, twin.weights(), dtype)
        geometry = KvGeometry(
            model="m",
            dtype=dtype,
            num_layers=twin.arch.num_layers,
            block_size=SIZE,
            num_kv_heads=twin.arch.num_kv_heads,
            head_dim=twin.arch.head_dim,
        )
        arena = KvArena(with_layout(geometry, model), 100)
        return ChunkScheduler(Executor(model, arena, Path()), limit, seed)

    return build


def requests(greedy):
    """Greedy and random requests with the logprobs of all tokens, which reveal any changed bit."""
    lives = mixed_requests(greedy)
    return [replace(r, sampling=replace(r.sampling, num_logprobs=VOCABULARY)) for r in lives]


def other_requests(greedy):
    """Requests that share the batch after a migration."""
    return [LiveRequest(prompt, greedy) for prompt in random_prompts(7, seed=9)]


def kv(scheduler, live):
    """uint8 [blocks, bytes]: all KV of a sequence; unwritten slots of a new arena are 0."""
    return torch.stack([scheduler.executor.arena.block(i) for i in live.table])


def answers(lives):
    return [(live.outputs, live.logprobs) for live in lives]


# --- three ways to migrate -----------------------------------------------------------------------


def transfer(live, source, target):
    target.receive(live, source)
    return live


def recompute(live, source, target):
    return LiveRequest(live.prompt, live.sampling, list(live.outputs), list(live.logprobs))


def split(live, source, target):
    """Recompute the first half of the blocks at the target, transfer the others."""
    start = len(live.table) // 2 * SIZE
    target.receive(live, source)
    for block in live.table[: start // SIZE]:
        target.executor.arena.block(block).fill_(0)
    for first in range(0, start, target.limit):
        end = min(start, first + target.limit)
        chunk = Chunk(0, first, tuple(live.tokens[first:end]), live.table, None, ((), []))
        target.executor.execute(StepPlan("m", (chunk,), ()))
    return live


MIGRATIONS = [transfer, recompute, split]


def migrated(migrate, lives, source, target):
    """The requests at the target; the KV of the source is overwritten."""
    arrived = [migrate(live, source, target) for live in lives]
    source.executor.arena.tensor.fill_(9.0)
    return arrived


# --- CpuModel: no bit changes --------------------------------------------------------------------


@pytest.mark.parametrize("migrate", MIGRATIONS)
def test_on_a_cpu_no_migration_changes_a_token_a_logprob_or_a_bit_of_kv(
    migrate, dtype, make_scheduler, greedy
):
    unmigrated = make_scheduler("cpu", dtype)
    expected = requests(greedy)
    unmigrated.run(expected, AFTER)
    source, target = make_scheduler("cpu", dtype), make_scheduler("cpu", dtype, 9, seed=4)
    lives = requests(greedy)
    source.run(lives, BEFORE)
    lives = migrated(migrate, lives, source, target)
    target.run([*other_requests(greedy), *lives], AFTER)
    assert answers(lives) == answers(expected)
    for ours, theirs in zip(lives, expected, strict=True):
        assert torch.equal(kv(target, ours), kv(unmigrated, theirs))


# --- kernels whose sums depend on the batch, as on GPUs ------------------------------------------


@pytest.fixture
def sums_depend_on_the_batch(monkeypatch):
    """Split products along k at a place that depends on the number of rows."""
    linear = functional.linear

    def in_two_parts(x, weight, bias=None):
        k = 1 + len(x) % (x.shape[-1] - 1)
        first, second = linear(x[:, :k], weight[:, :k], bias), linear(x[:, k:], weight[:, k:])
        return first + second

    monkeypatch.setattr(functional, "linear", in_two_parts)


pytestmark = pytest.mark.usefixtures("sums_depend_on_the_batch")


def test_with_any_kernels_a_transfer_keeps_every_byte_of_kv(dtype, make_scheduler, greedy):
    source, target = make_scheduler("torch", dtype), make_scheduler("torch", dtype, seed=4)
    lives = requests(greedy)
    source.run(lives, BEFORE)
    before = [kv(source, live).clone() for live in lives]
    lives = migrated(transfer, lives, source, target)
    assert all(torch.equal(kv(target, live), b) for live, b in zip(lives, before, strict=True))


def test_with_any_kernels_a_transfer_of_a_whole_batch_changes_no_answer(
    dtype, make_scheduler, greedy
):
    """The same batches over other blocks: a transfer by itself changes nothing."""
    expected, lives = requests(greedy), requests(greedy)
    make_scheduler("torch", dtype).run(expected, AFTER)
    source, target = make_scheduler("torch", dtype), make_scheduler("torch", dtype, seed=4)
    source.run(lives, BEFORE)
    lives = migrated(transfer, lives, source, target)
    target.run(lives, AFTER)
    assert answers(lives) == answers(expected)


class ExactModel:
    """The same weights in float32 without a KV cache: the reference for rounding errors."""

    def __init__(self, make_scheduler, twin):
        weights = {name: value.float() for name, value in twin.weights().items()}
        self.model = MAKERS["torch"](twin.arch, weights, torch.float32)
        self.arena = make_scheduler("torch", torch.float32).executor.arena

    def error(self, live):
        """The largest error of all logprobs of a request."""
        return max(
            (self._logprobs(live, i)[list(ids)] - torch.tensor(values)).abs().max().item()
            for i, (_, ids, values) in enumerate(live.logprobs)
        )

    def shortfall(self, live):
        """The largest difference in logprob between the likeliest and the chosen token."""
        exact = [self._logprobs(live, i) for i in range(len(live.outputs))]
        return max((t.max() - t[o]).item() for t, o in zip(exact, live.outputs, strict=True))

    def _logprobs(self, live, index):
        """float32 [vocabulary]: the logprobs of output number `index`."""
        tokens = tuple(live.tokens[: len(live.prompt) + index])
        chunk = Chunk(0, 0, tokens, list(range(8)), live.sampling, (tokens, []))
        logits = self.model.forward(pack(StepPlan("m", (chunk,), ()), SIZE), self.arena)
        return logits[0].log_softmax(-1)


@pytest.fixture
def exact(make_scheduler, get_twin):
    return ExactModel(make_scheduler, get_twin("llama", torch.bfloat16))


@pytest.fixture
def rounding(make_scheduler, exact, greedy):
    """The largest error of requests that never migrate."""
    return max(map(exact.error, never_migrated(make_scheduler, greedy, torch.bfloat16)))


def all_greedy(greedy):
    return [
        replace(live, sampling=replace(greedy, num_logprobs=VOCABULARY))
        for live in mixed_requests(greedy)
    ]


def migrated_halfway(migrate, make_scheduler, greedy, dtype=torch.bfloat16):
    """Requests that have migrated, and their outputs before the migration."""
    source, target = make_scheduler("torch", dtype), make_scheduler("torch", dtype, 9, seed=4)
    lives = all_greedy(greedy)
    source.run(lives, BEFORE)
    before = [list(live.outputs) for live in lives]
    lives = migrated(migrate, lives, source, target)
    target.run([*other_requests(greedy), *lives], AFTER)
    return lives, before


@pytest.mark.parametrize("migrate", MIGRATIONS)
def test_with_any_kernels_a_migrated_answer_is_as_exact_as_an_unmigrated_one(
    migrate, make_scheduler, greedy, exact, rounding
):
    lives, before = migrated_halfway(migrate, make_scheduler, greedy)
    assert [live.outputs[:BEFORE] for live in lives] == before
    assert max(map(exact.error, lives)) <= 2 * rounding
    assert max(map(exact.shortfall, lives)) <= 4 * rounding  # the error of each of two tokens


def never_migrated(make_scheduler, greedy, dtype):
    lives = all_greedy(greedy)
    make_scheduler("torch", dtype).run(lives, AFTER)
    return lives


@pytest.mark.parametrize("migrate", MIGRATIONS)
def test_in_float32_such_kernels_change_bits_and_no_token(migrate, make_scheduler, greedy):
    lives, _ = migrated_halfway(migrate, make_scheduler, greedy, torch.float32)
    expected = never_migrated(make_scheduler, greedy, torch.float32)
    assert [live.outputs for live in lives] == [live.outputs for live in expected]
    assert answers(lives) != answers(expected)


def test_in_bfloat16_another_batch_alone_changes_answers(make_scheduler, greedy):
    """So no stronger guarantee is possible, even for requests that never migrate."""
    alone = all_greedy(greedy)
    for live in alone:
        make_scheduler("torch", torch.bfloat16).run([live], AFTER)
    together = never_migrated(make_scheduler, greedy, torch.bfloat16)
    assert [live.outputs for live in alone] != [live.outputs for live in together]


def test_wrong_kv_in_one_block_is_detected(make_scheduler, greedy, exact, rounding):
    def corrupting(live, source, target):
        transfer(live, source, target)
        target.executor.arena.block(live.table[0]).fill_(0)
        return live

    lives, _ = migrated_halfway(corrupting, make_scheduler, greedy)
    assert max(map(exact.error, lives)) > 2 * rounding
