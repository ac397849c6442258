"""A batch scheduler under random messages; a hash of the KV as token verifies the KV."""

from collections import Counter

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from mellmpi.config import BatchConfig, CacheConfig
from mellmpi.protocol import (
    DATA_PLANE,
    ROUNDS,
    SCHEDULER,
    Assign,
    BlocksArrived,
    BlocksSent,
    Chunk,
    DrainBlocks,
    HostedModel,
    KvFailed,
    KvPayload,
    KvReceived,
    KvRefused,
    KvReserved,
    Park,
    Parked,
    PartComputed,
    ReceiveBlocks,
    ReceiveKv,
    Release,
    SendBlocks,
    SendKv,
    StepPlan,
    Unfreeze,
    blocks_for,
)
from mellmpi.scheduler.requests import TokenLog
from mellmpi.sim.executor import HashExecutor, expected_outputs
from mellmpi.worker import BatchScheduler
from mellmpi.worker.sequences import Phase
from tests.scheduler.stage import KV, request

SIZE, HOSTED = KV.block_size, HostedModel(KV, "layout")
LENGTHS = [(1, 9), (3, 5), (4, 8), (9, 6), (10, 12), (17, 3)]  # (prompt, output)
REQUESTS = [request(i, num_prompt=n, max_tokens=m, seed=i) for i, (n, m) in enumerate(LENGTHS)]
ANSWERS = [tuple(expected_outputs(r)) for r in REQUESTS]


def kv_of(which: int, num_positions: int) -> np.ndarray:
    """Blocks as a source would compute them. uint64 [blocks, SIZE]"""
    num_blocks = max(1, blocks_for(num_positions, SIZE))
    engine = HashExecutor(num_blocks, [KV])
    tokens = (REQUESTS[which].prompt + ANSWERS[which])[:num_positions]
    if tokens:
        chunk = Chunk(which, 0, tokens, list(range(num_blocks)), None, ((), []))
        engine.execute(StepPlan(KV.model, (chunk,), ()))
    return engine.arena


class BatchHistory(RuleBasedStateMachine):
    """The test acts as rank 0, the peers and the data plane, within the handover protocol."""

    @initialize(
        num_blocks=st.integers(3, 12),
        limits=st.sampled_from([(2, 2), (3, 8), (8, 64)]),
        prefix=st.booleans(),
    )
    def make(self, num_blocks, limits, prefix):
        self.limits = BatchConfig(max_num_seqs=limits[0], max_num_batched_tokens=limits[1])
        cache = CacheConfig(enable_prefix_caching=prefix)
        self.batch = BatchScheduler((HOSTED,), num_blocks, 0, self.limits, cache)
        self.engine = HashExecutor(num_blocks, [KV])
        self.epoch = 0
        self.request_of = {}  # epoch -> index of its request
        self.logs = {}  # epoch -> tokens reported
        self.reserved = {}  # epoch -> [tokens logged, next block], before the last header
        self.receives = []  # (order, kv)
        self.sends = []  # (order, content of the blocks when it was posted)
        self.headers = []  # sent by this worker
        self.orders = self.round = 0
        self.dst_epoch = 10_000  # the newest epoch at a destination
        self.outgoing = {}  # epoch at the destination -> (epoch here, next block)
        self.rounds = {}  # tag of announced blocks -> (index of the request, first block, number)
        self.computing = set()  # destination epochs: the destination still computes its part
        self.notified = set()  # epochs for which `PartComputed` has been sent

    def new_epoch(self, which):
        self.epoch += 1
        self.request_of[self.epoch] = which
        return self.epoch

    def order(self, command):
        self.orders += 1
        return self.check_sent(self.batch.handle(SCHEDULER, command))

    def some_epoch(self, data):
        """Draw an epoch, possibly of a sequence that has ended or never existed."""
        return data.draw(st.integers(1, self.epoch + 1), label="epoch")

    # --- orders ---------------------------------------------------------------------------------

    @rule(which=st.integers(0, len(REQUESTS) - 1), data=st.data())
    def assign(self, which, data):
        known = data.draw(st.integers(0, len(ANSWERS[which]) - 1))
        epoch = self.new_epoch(which)
        self.logs[epoch] = TokenLog(list(ANSWERS[which][:known]))
        assert self.order(Assign(REQUESTS[which], epoch, ANSWERS[which][:known])) == []

    @precondition(lambda self: self.epoch)
    @rule(data=st.data())
    def release(self, data):
        epoch = self.some_epoch(data)
        assert self.order(Release(0, epoch)) == []
        assert epoch not in self.batch.sequences

    @rule(which=st.integers(0, len(REQUESTS) - 1), data=st.data())
    def reserve(self, which, data):
        logged = data.draw(st.integers(0, len(ANSWERS[which]) - 1))
        epoch, prompt = self.new_epoch(which), len(REQUESTS[which].prompt)
        need, free = blocks_for(prompt + logged, SIZE), self.batch.pool.num_free
        start = SIZE * data.draw(st.integers(0, (prompt + logged - 1) // SIZE), label="start")
        outputs = ANSWERS[which][:logged]
        [(_, answer)] = self.order(
            ReceiveKv(REQUESTS[which], epoch, 2, logged, prompt + logged, start, outputs)
        )
        if isinstance(answer, KvRefused):
            assert need > free and answer == KvRefused(which, epoch)
            return
        assert answer.start >= start and answer.start % SIZE == 0
        assert answer == KvReserved(which, epoch, answer.start)
        self.reserved[epoch] = [logged, answer.start // SIZE]
        self.logs[epoch] = TokenLog(list(ANSWERS[which][:logged]))

    @precondition(lambda self: self.epoch)
    @rule(data=st.data())
    def send(self, data):
        epoch = self.some_epoch(data)
        sequence = self.batch.sequences.get(epoch)
        if sequence is not None and sequence.phase is not Phase.RUNNING:
            return  # rank 0 would not send this
        if sequence is not None and sequence.outgoing is not None:
            return
        self.dst_epoch += 1
        start = data.draw(st.integers(0, sequence.num_computed // SIZE)) if sequence else 0
        self.outgoing[self.dst_epoch] = (epoch, start)
        self.computing |= {self.dst_epoch} if start else set()
        headers = len(self.headers)
        assert self.order(SendKv(0, epoch, 3, self.dst_epoch, start * SIZE)) == []
        assert len(self.headers) == headers + (sequence is not None)

    @precondition(lambda self: self.outgoing)
    @rule(data=st.data())
    def part_computed(self, data):
        """The destination has computed its part; possibly after the end, or repeated."""
        epoch = data.draw(st.integers(10_001, self.dst_epoch + 1), label="epoch")
        self.computing.discard(epoch)
        assert self.check_sent(self.batch.handle(3, PartComputed(0, epoch))) == []

    def check_sent(self, commands):
        """Check the messages of a source. Returns the other messages."""
        rest, headed = [], len(self.headers)
        for to, command in commands:
            match command:
                case KvPayload():
                    self.check_header(to, command)
                case SendBlocks():
                    assert to == DATA_PLANE
                    self.check_blocks(command)
                case _:
                    rest.append((to, command))
        awaited = [h for h in self.headers[headed:] if h.num_blocks and h.tag in self.rounds]
        assert not any(h.last for h in awaited), "blocks of a frozen sequence are sent at once"
        return rest

    def check_header(self, to, header):
        """It announces the unsent full blocks, or these and the next block, or all the rest."""
        epoch, first = self.outgoing[header.epoch]
        sequence = self.batch.sequences[epoch]
        assert to == 3 and header.num_computed == sequence.num_computed
        assert header.first_block == first and header.tag // ROUNDS == header.epoch
        full, all_of_it = header.num_computed // SIZE, blocks_for(header.num_computed, SIZE)
        ends = (all_of_it,) if header.last else (full, full + 1)
        assert header.num_blocks in [max(0, end - first) for end in ends]
        assert header.outputs == (tuple(sequence.outputs) if header.last else ())
        assert (sequence.phase is Phase.FROZEN) == header.last
        # Without room for its next token, or in mid-prefill, the source cannot compute a decode.
        stuck = len(sequence.block_table) == all_of_it and not self.batch.pool.num_free
        stuck |= sequence.num_tokens - sequence.num_computed > 1
        assert not header.last or header.epoch not in self.computing or stuck
        self.outgoing[header.epoch] = (epoch, first + header.num_blocks)
        self.headers.append(header)
        if header.num_blocks:
            assert header.tag not in self.rounds
            self.rounds[header.tag] = (self.request_of[epoch], first, header.num_blocks)

    def check_blocks(self, order):
        """The blocks of a header are sent, valid up to the computed positions."""
        which, first, num_blocks = self.rounds.pop(order.tag)
        assert len(order.block_ids) == num_blocks
        batch = self.batch
        sequence = batch.sequences.get(order.epoch) or batch.lingering[order.epoch]
        as_sent = self.engine.arena[list(order.block_ids)]
        self.sends.append((order, as_sent))
        right = kv_of(which, sequence.num_computed)[first:].reshape(-1)
        valid = min(as_sent.size, sequence.num_computed - first * SIZE)
        assert (as_sent.reshape(-1)[:valid] == right[:valid]).all()
        goes_on = sequence.outgoing is not None and order.epoch in batch.sequences
        if goes_on and order.tag // ROUNDS in self.computing and sequence.phase is Phase.RUNNING:
            assert valid == as_sent.size, (
                "blocks still being written are sent only after the freeze"
            )

    @precondition(lambda self: self.epoch)
    @rule(data=st.data())
    def unfreeze(self, data):
        epoch = self.some_epoch(data)
        sequence = self.batch.sequences.get(epoch)
        if sequence is None or sequence.outgoing is not None:
            assert self.order(Unfreeze(0, epoch)) == []

    # --- peers and the data plane ---------------------------------------------------------------

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), layout=st.sampled_from(["layout"] * 5 + ["other"]))
    def header(self, data, layout):
        epoch = data.draw(st.sampled_from(sorted(self.reserved)))
        which, (logged, first) = self.request_of[epoch], self.reserved[epoch]
        outputs = data.draw(st.integers(logged, len(ANSWERS[which]) - 1))
        known = len(REQUESTS[which].prompt) + outputs
        computed = data.draw(st.integers(0, known - 1))
        ahead = data.draw(st.booleans(), label="ahead")  # the next block is not computed yet
        last = data.draw(st.booleans()) or (not ahead and computed // SIZE <= first)
        end = blocks_for(computed, SIZE) if last else computed // SIZE + ahead
        num_blocks = max(0, end - first)
        if not last:
            computed = end * SIZE
        self.reserved[epoch] = [outputs, first + num_blocks]
        if last:
            del self.reserved[epoch]
        expected, self.round = epoch in self.batch.sequences, self.round + 1
        commands = self.check_notified(
            self.batch.handle(
                2,
                KvPayload(
                    which,
                    epoch,
                    layout,
                    first,
                    num_blocks,
                    computed,
                    ANSWERS[which][:outputs] if last else (),
                    (),
                    last,
                    self.round,
                ),
            )
        )
        drain = [(DATA_PLANE, DrainBlocks(2, self.round, num_blocks))] if num_blocks else []
        match commands:
            case [(_, ReceiveBlocks() as order)]:
                table = self.batch.sequences[epoch].block_table
                assert order.block_ids == tuple(table[first : first + num_blocks])
                kv = kv_of(which, computed)[first : first + num_blocks]
                self.receives.append((order, kv))
            case [*first, (_, KvFailed())]:
                assert expected and first == drain
            case [(_, KvReceived() as received)]:
                self.arrived(epoch, received)
            case _:
                assert commands == drain and (not expected or not num_blocks)

    def check_notified(self, commands):
        """Check `PartComputed` messages. Returns the other messages."""
        for to, message in [c for c in commands if isinstance(c[1], PartComputed)]:
            sequence = self.batch.sequences[message.epoch]
            assert to == 2 and message.epoch not in self.notified
            assert sequence.num_computed >= sequence.incoming.start > 0
            self.notified.add(message.epoch)
        return [c for c in commands if not isinstance(c[1], PartComputed)]

    @precondition(lambda self: self.receives)
    @rule(data=st.data(), ok=st.sampled_from([True, True, True, False]))
    def blocks_arrive(self, data, ok):
        i = data.draw(st.integers(0, len(self.receives) - 1))
        order, kv = self.receives.pop(i)
        self.engine.arena[list(order.block_ids)] = kv if ok else 0
        expected = order.epoch in self.batch.sequences
        reason = "" if ok else "checksum"
        commands = self.batch.handle(
            DATA_PLANE,
            BlocksArrived(order.request_id, order.epoch, ok, 0.1, order.tag, reason),
        )
        match commands:
            case [(_, KvReceived() as received)]:
                assert ok and expected
                self.arrived(order.epoch, received)
            case [(_, KvFailed())]:
                assert expected and not ok
            case _:
                assert commands == [] and (ok or not expected)

    def arrived(self, epoch, received):
        log = self.logs[epoch]
        assert received.first == len(log.tokens)
        log.merge(received.first, received.tokens)

    @precondition(lambda self: self.sends)
    @rule(data=st.data())
    def blocks_sent(self, data):
        order, as_sent = self.sends.pop(data.draw(st.integers(0, len(self.sends) - 1)))
        assert (self.engine.arena[list(order.block_ids)] == as_sent).all(), "written while sent"
        sent = BlocksSent(order.request_id, order.epoch, order.tag)
        assert self.check_sent(self.batch.handle(DATA_PLANE, sent)) == []

    # --- steps and reports ----------------------------------------------------------------------

    @rule()
    def step(self):
        batch, before = self.batch, dict(self.batch.sequences)
        computed = {epoch: s.num_computed for epoch, s in before.items()}
        plan = batch.plan()
        self.check_preempted(before)
        assert plan is not None or not self.rounds, "an announced sequence gets a step"
        if plan is not None:
            self.check_plan(plan, computed)
            commands = batch.commit(plan, self.engine.execute(plan))
            for _, received in self.check_notified(self.check_sent(commands)):
                assert isinstance(received, KvReceived)
                self.arrived(received.epoch, received)
            late = [tag for tag in self.rounds if tag // ROUNDS not in self.computing]
            assert not late, "announced blocks are sent after the step"
            self.check_full_blocks_are_sent()
        for sequence in before.values():
            answer = ANSWERS[self.request_of[sequence.epoch]]
            assert tuple(sequence.outputs) == answer[: len(sequence.outputs)], "wrong token"

    def check_full_blocks_are_sent(self):
        for tag, (_, first, num_blocks) in self.rounds.items():
            sequence = self.batch.sequences[self.outgoing[tag // ROUNDS][0]]
            assert sequence.num_computed < (first + num_blocks) * SIZE

    def check_preempted(self, before):
        """No sequence is preempted while a younger one keeps running."""
        gone = [e for e in before if e not in self.batch.sequences]
        assert all(before[e].phase is Phase.RUNNING and not before[e].in_flight for e in gone)
        running = [
            e
            for e, s in self.batch.sequences.items()
            if s.phase is Phase.RUNNING and not s.in_flight
        ]
        order = list(before)
        assert not gone or all(order.index(e) < order.index(g) for e in running for g in gone)

    def check_plan(self, plan, computed):
        limits, planned = self.limits, self.batch._planned
        assert 0 < len(plan.chunks) <= limits.max_num_seqs
        assert sum(len(c.tokens) for c in plan.chunks) <= limits.max_num_batched_tokens
        sampled = [c.sampling is not None for c in plan.chunks]
        assert sampled == sorted(sampled, reverse=True), "sampled chunks come first"
        decodes = [s for s in self.batch.sequences.values() if self.decoding(s, computed)]
        left_out = [s for s in decodes if s not in planned]
        assert not left_out or all(s in decodes for s in planned), "decodes come first"
        written = Counter()
        for chunk, sequence in zip(plan.chunks, planned, strict=True):
            assert sequence.phase is not Phase.FROZEN and not sequence.sending_partial
            assert chunk.tokens and chunk.start == computed[sequence.epoch], "computed once"
            end = chunk.start + len(chunk.tokens)
            catches_up = sequence.phase is Phase.RUNNING and end == sequence.num_tokens
            assert (chunk.sampling is not None) == catches_up
            written.update({chunk.block_table[p // SIZE] for p in range(chunk.start, end)})
        assert all(n == 1 for n in written.values()), "two sequences write one block"
        moving = {b for order, _ in self.sends + self.receives for b in order.block_ids}
        assert not moving & written.keys(), "a block in flight is written"
        assert all(self.batch.pool._ref_counts[b] == 1 for b in written), (
            "a shared block is written"
        )

    def decoding(self, sequence, computed):
        gap = sequence.num_tokens - computed[sequence.epoch]
        return sequence.phase is Phase.RUNNING and not sequence.sending_partial and gap == 1

    @rule()
    def report(self):
        report = self.batch.report(1, 0.1)
        if report is None:
            return
        assert report.acked == self.orders and report.free_bytes == self.batch.free_bytes
        end = 0
        runs = zip(report.epochs, report.firsts, report.counts, strict=True)
        for epoch, first, num_tokens in runs:
            start, end = end, end + num_tokens
            assert first == len(self.logs[epoch].tokens) and num_tokens
            self.logs[epoch].merge(first, report.tokens[start:end])
        assert end == len(report.tokens)
        for _, epoch in report.preempted:
            assert epoch not in self.batch.sequences
        for epoch, sequence in self.batch.sequences.items():
            if sequence.phase is not Phase.RECEIVING:
                assert self.logs[epoch].tokens == sequence.outputs, "rank 0 knows all tokens now"

    # --- invariants -----------------------------------------------------------------------------

    @invariant()
    def each_block_is_in_exactly_one_place(self):
        if not hasattr(self, "batch"):
            return
        batch = self.batch
        assert not batch.sequences.keys() & batch.lingering.keys()
        held = Counter()
        for sequence in [*batch.sequences.values(), *batch.lingering.values()]:
            assert len(set(sequence.block_table)) == len(sequence.block_table)
            held.update(sequence.block_table)
        assert batch.pool._ref_counts == [held[block] for block in range(batch.pool.num_blocks)]
        assert len(held) + batch.pool.num_free == batch.pool.num_blocks
        assert all(s.in_flight for s in batch.lingering.values())
        touched = {b for order, _ in self.sends + self.receives for b in order.block_ids}
        assert touched <= held.keys(), "blocks in transfer were freed"
        announced = {self.outgoing[tag // ROUNDS][0] for tag in self.rounds}
        assert announced <= batch.sequences.keys(), (
            "announced blocks of an ended sequence are sent at once"
        )

    @invariant()
    def part_computed_is_sent_when_the_part_is_computed(self):
        for epoch, sequence in self.batch.sequences.items() if hasattr(self, "batch") else ():
            if (incoming := sequence.incoming) is None or incoming.num_computed is not None:
                continue
            done = incoming.announced and sequence.num_computed >= incoming.start > 0
            assert (epoch in self.notified) == done

    @invariant()
    def computed_is_less_than_known(self):
        if hasattr(self, "batch"):
            for sequence in self.batch.sequences.values():
                assert sequence.num_computed < sequence.num_tokens
                assert blocks_for(sequence.num_computed, SIZE) <= len(sequence.block_table)

    def teardown(self):
        if not hasattr(self, "batch"):
            return
        for epoch in range(1, self.epoch + 1):
            self.order(Release(0, epoch))
        for order, _ in self.receives:
            arrived = BlocksArrived(order.request_id, order.epoch, True, 0.1, order.tag, "")
            self.batch.handle(DATA_PLANE, arrived)
        waiting = self.order(Park()) if self.sends else None
        assert not waiting
        parked = []
        for order, _ in self.sends:
            parked = self.batch.handle(
                DATA_PLANE, BlocksSent(order.request_id, order.epoch, order.tag)
            )
        assert self.batch.pool.num_free == self.batch.pool.num_blocks
        parked = parked or self.order(Park())
        assert parked == [(SCHEDULER, Parked(self.orders))]


TestBatchHistory = BatchHistory.TestCase
TestBatchHistory.settings = settings(max_examples=120, stateful_step_count=50)
