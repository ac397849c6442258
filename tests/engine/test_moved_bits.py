"""What a move may change of an answer, in both precisions and with both kinds of kernels.

docs/design.md, "What a move changes", says it in words. A request is computed in one place, moved
in each of the three ways, and goes on in other company, over other blocks.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from mellmpi.engine import Executor, KvArena, KvGeometry, pack
from mellmpi.engine.executor import as_laid_out
from mellmpi.protocol import Chunk, StepPlan
from tests.engine.conftest import MAKERS
from tests.engine.test_executor import Live, Loop, mixed_requests, random_prompts

SIZE, VOCABULARY = 16, 131
BEFORE, AFTER = 5, 14  # outputs when it moves, and in the end


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def place(get_twin):
    """(kind of kernels, dtype) -> a loop over a model of its own and an empty arena."""

    def build(kind, dtype, limit=1000, seed=0):
        one = get_twin("llama", dtype)
        model = MAKERS[kind](one.arch, one.weights(), dtype)
        geometry = KvGeometry(
            model="m",
            dtype=dtype,
            num_layers=one.arch.num_layers,
            block_size=SIZE,
            num_kv_heads=one.arch.num_kv_heads,
            head_dim=one.arch.head_dim,
        )
        arena = KvArena(as_laid_out(geometry, model), 100)
        return Loop(Executor(model, arena), limit, seed)

    return build


def requests(greedy):
    """Greedy and sampled ones, with the logprobs of all tokens: any other bit would show."""
    lives = mixed_requests(greedy)
    return [replace(r, sampling=replace(r.sampling, num_logprobs=VOCABULARY)) for r in lives]


def company(greedy):
    return [Live(prompt, greedy) for prompt in random_prompts(7, seed=9)]


def kv(loop, live):
    """uint8 [blocks, bytes]: all KV of a sequence. Slots nobody wrote are 0 in a fresh arena."""
    return torch.stack([loop.executor.arena.block(i) for i in live.table])


def answers(lives):
    return [(live.outputs, live.logprobs) for live in lives]


# --- the three ways ------------------------------------------------------------------------------


def transfer(live, here, there):
    there.receive(live, here)
    return live


def recompute(live, here, there):
    return Live(live.prompt, live.sampling, list(live.outputs), list(live.logprobs))


def split(live, here, there):
    """The first blocks are computed there, the others sent."""
    start = len(live.table) // 2 * SIZE
    there.receive(live, here)
    for block in live.table[: start // SIZE]:
        there.executor.arena.block(block).fill_(0)
    for first in range(0, start, there.limit):
        end = min(start, first + there.limit)
        chunk = Chunk(0, first, tuple(live.tokens[first:end]), live.table, None, ((), []))
        there.executor.execute(StepPlan("m", (chunk,), ()))
    return live


WAYS = [transfer, recompute, split]


def moved(way, lives, here, there):
    """The same requests elsewhere, and nothing left where they were."""
    found = [way(live, here, there) for live in lives]
    here.executor.arena.tensor.fill_(9.0)
    return found


# --- our kernels for CPUs: not a bit -------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_on_a_cpu_no_move_changes_a_token_a_logprob_or_a_bit_of_kv(way, dtype, place, greedy):
    unmoved = place("cpu", dtype)
    expected = requests(greedy)
    unmoved.run(expected, AFTER)
    here, there, lives = place("cpu", dtype), place("cpu", dtype, 9, seed=4), requests(greedy)
    here.run(lives, BEFORE)
    lives = moved(way, lives, here, there)
    there.run([*company(greedy), *lives], AFTER)
    assert answers(lives) == answers(expected)
    for ours, theirs in zip(lives, expected, strict=True):
        assert torch.equal(kv(there, ours), kv(unmoved, theirs))


# --- kernels whose sums depend on the batch, as GPUs have them -----------------------------------


@pytest.fixture
def sums_depend_on_the_batch(monkeypatch):
    """Products are split along k, and where depends on the number of rows."""
    linear = functional.linear

    def in_two_parts(x, weight, bias=None):
        k = 1 + len(x) % (x.shape[-1] - 1)
        first, second = linear(x[:, :k], weight[:, :k], bias), linear(x[:, k:], weight[:, k:])
        return first + second

    monkeypatch.setattr(functional, "linear", in_two_parts)


pytestmark = pytest.mark.usefixtures("sums_depend_on_the_batch")


def test_whatever_the_kernels_a_transfer_leaves_every_byte_of_kv(dtype, place, greedy):
    here, there, lives = place("torch", dtype), place("torch", dtype, seed=4), requests(greedy)
    here.run(lives, BEFORE)
    before = [kv(here, live).clone() for live in lives]
    lives = moved(transfer, lives, here, there)
    assert all(torch.equal(kv(there, live), b) for live, b in zip(lives, before, strict=True))


def test_whatever_the_kernels_transferred_in_company_they_answer_as_unmoved(dtype, place, greedy):
    """The same batches over other blocks: a transfer itself adds nothing."""
    expected, lives = requests(greedy), requests(greedy)
    place("torch", dtype).run(expected, AFTER)
    here, there = place("torch", dtype), place("torch", dtype, seed=4)
    here.run(lives, BEFORE)
    lives = moved(transfer, lives, here, there)
    there.run(lives, AFTER)
    assert answers(lives) == answers(expected)


class Truth:
    """The same weights, computed in float32 with nothing cached: what rounding is measured by."""

    def __init__(self, place, one):
        weights = {name: value.float() for name, value in one.weights().items()}
        self.model = MAKERS["torch"](one.arch, weights, torch.float32)
        self.arena = place("torch", torch.float32).executor.arena

    def error(self, live):
        """The largest error of its logprobs, of all tokens after each of its own."""
        return max(
            (self._logprobs(live, i)[list(ids)] - torch.tensor(values)).abs().max().item()
            for i, (_, ids, values) in enumerate(live.logprobs)
        )

    def shortfall(self, live):
        """By how much the likeliest token is likelier than the chosen one, at most."""
        truths = [self._logprobs(live, i) for i in range(len(live.outputs))]
        return max((t.max() - t[o]).item() for t, o in zip(truths, live.outputs, strict=True))

    def _logprobs(self, live, index):
        """float32 [vocabulary]: of the output of this index."""
        tokens = tuple(live.tokens[: len(live.prompt) + index])
        chunk = Chunk(0, 0, tokens, list(range(8)), live.sampling, (tokens, []))
        logits = self.model.forward(pack(StepPlan("m", (chunk,), ()), SIZE), self.arena)
        return logits[0].log_softmax(-1)


@pytest.fixture
def truth(place, get_twin):
    return Truth(place, get_twin("llama", torch.bfloat16))


@pytest.fixture
def rounding(place, truth, greedy):
    """How far a request that never moved is from the truth, at most."""
    return max(map(truth.error, stayed(place, greedy, torch.bfloat16)))


def all_greedy(greedy):
    return [
        replace(live, sampling=replace(greedy, num_logprobs=VOCABULARY))
        for live in mixed_requests(greedy)
    ]


def go_on(way, place, greedy, dtype=torch.bfloat16):
    """Requests that have moved in this way, and what they had answered before."""
    here, there = place("torch", dtype), place("torch", dtype, 9, seed=4)
    lives = all_greedy(greedy)
    here.run(lives, BEFORE)
    before = [list(live.outputs) for live in lives]
    lives = moved(way, lives, here, there)
    there.run([*company(greedy), *lives], AFTER)
    return lives, before


@pytest.mark.parametrize("way", WAYS)
def test_whatever_the_kernels_a_moved_answer_is_as_true_as_an_unmoved_one(
    way, place, greedy, truth, rounding
):
    lives, before = go_on(way, place, greedy)
    assert [live.outputs[:BEFORE] for live in lives] == before
    assert max(map(truth.error, lives)) <= 2 * rounding
    assert max(map(truth.shortfall, lives)) <= 4 * rounding  # two tokens, each off by its error


def stayed(place, greedy, dtype):
    lives = all_greedy(greedy)
    place("torch", dtype).run(lives, AFTER)
    return lives


@pytest.mark.parametrize("way", WAYS)
def test_in_float32_such_kernels_change_bits_and_no_token(way, place, greedy):
    lives, _ = go_on(way, place, greedy, torch.float32)
    expected = stayed(place, greedy, torch.float32)
    assert [live.outputs for live in lives] == [live.outputs for live in expected]
    assert answers(lives) != answers(expected)


def test_in_bfloat16_other_company_alone_changes_answers(place, greedy):
    """Why no more can be promised: even of requests that never move."""
    alone = all_greedy(greedy)
    for live in alone:
        place("torch", torch.bfloat16).run([live], AFTER)
    together = stayed(place, greedy, torch.bfloat16)
    assert [live.outputs for live in alone] != [live.outputs for live in together]


def test_kv_that_is_wrong_in_one_block_would_show(place, greedy, truth, rounding):
    def careless(live, here, there):
        transfer(live, here, there)
        there.executor.arena.block(live.table[0]).fill_(0)
        return live

    lives, _ = go_on(careless, place, greedy)
    assert max(map(truth.error, lives)) > 2 * rounding
