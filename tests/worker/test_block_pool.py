"""The block pool: what it gives is held, what is held is nobody else's."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mellmpi.protocol import blocks_for
from mellmpi.worker.kvcache import BlockPool, block_key


@pytest.fixture
def pool():
    pool = BlockPool(4)
    yield pool
    assert pool.num_free == 4  # a test gives back what it takes


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_a_started_block_is_a_whole_one(tokens, blocks):
    assert blocks_for(tokens, 4) == blocks


def test_a_key_tells_the_tokens_of_the_block_and_all_before_it():
    first, other = block_key(b"", (1, 2)), block_key(b"", (1, 3))
    assert first == block_key(b"", (1, 2)) != other
    assert block_key(first, (5, 6)) != block_key(other, (5, 6))


def test_a_refused_take_changes_nothing(pool):
    assert pool.take(5) is None and pool.num_free == 4


def test_nothing_taken_is_given_twice(pool):
    a, b = pool.take(2), pool.take(2)
    assert sorted(a + b) == [0, 1, 2, 3]
    pool.give(a + b)


def test_a_block_freed_twice_is_a_bug(pool):
    ids = pool.take(1)
    pool.give(ids)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.give(ids)


def test_only_what_is_held_can_be_known(pool):
    with pytest.raises(AssertionError, match="not held"):
        pool.know(0, b"k")


def known(pool, *keys):
    """A block with each of these contents, given back in this order."""
    ids = pool.take(len(keys))
    for block, key in zip(ids, keys, strict=True):
        pool.know(block, key)
    for block in ids:
        pool.give([block])
    return ids


def test_a_known_prefix_is_shared_up_to_the_first_unknown_block(pool):
    a, b, c = known(pool, b"a", b"b", b"c")
    assert pool.share([b"a", b"b", b"x", b"c"]) == [a, b]
    assert pool.is_held(a) and pool.is_held(b) and not pool.is_held(c)
    pool.give([a, b])


def test_a_block_shared_by_two_is_free_when_both_have_let_go(pool):
    [a] = known(pool, b"a")
    assert pool.share([b"a"]) == pool.share([b"a"]) == [a]
    assert pool.num_free == 3
    pool.give([a])
    assert pool.num_free == 3
    pool.give([a])


def test_kept_blocks_go_last_and_the_one_given_back_longest_ago_first(pool):
    a, b = known(pool, b"a", b"b")
    ids = pool.take(3)
    assert a in ids and b not in ids
    assert pool.share([b"a"]) == [] and pool.share([b"b"]) == [b]
    pool.give([*ids, b])


def test_of_one_sequence_the_tail_is_evicted_before_the_prefix(pool):
    ids = pool.take(2)
    pool.know(ids[0], b"prefix")
    pool.know(ids[1], b"tail")
    pool.give(ids)
    others = pool.take(3)
    assert pool.share([b"prefix"]) == [ids[0]] and pool.share([b"tail"]) == []
    pool.give([*others, ids[0]])


def test_the_first_block_with_a_content_is_the_one_to_share(pool):
    a, b = pool.take(2)
    pool.know(a, b"k")
    pool.know(b, b"k")
    pool.give([b])
    assert pool.share([b"k"]) == [a]
    pool.give([a, a])
    assert pool.take(4) is not None
    pool.give([0, 1, 2, 3])


def test_what_a_block_contains_is_settled_once(pool):
    ids = pool.take(1)
    pool.know(ids[0], b"first")
    pool.know(ids[0], b"second")
    pool.give(ids)
    assert pool.share([b"second"]) == []


class PoolHistory(RuleBasedStateMachine):
    """Whatever is taken, known, shared and given back: each block is in exactly one place."""

    @initialize(num_blocks=st.integers(1, 8))
    def make(self, num_blocks):
        self.pool, self.held = BlockPool(num_blocks), []
        self.content = {}  # block -> key, as long as its content is its own

    @rule(n=st.integers(0, 9))
    def take(self, n):
        free = self.pool.num_free
        ids = self.pool.take(n)
        assert (ids is None) == (n > free)
        if ids is None:
            return
        assert len(ids) == n
        assert not set(ids) & {block for table in self.held for block in table}
        for block in ids:
            self.content.pop(block, None)
        self.held.append(ids)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give(self, data):
        self.pool.give(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), key=st.sampled_from([b"a", b"b", b"c"]))
    def know(self, data, key):
        block = data.draw(st.sampled_from(sorted({b for table in self.held for b in table})))
        self.pool.know(block, key)
        if block not in self.content and key not in self.content.values():
            self.content[block] = key

    @rule(keys=st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=3, unique=True))
    def share(self, keys):
        ids = self.pool.share(keys)
        where = {key: block for block, key in self.content.items()}
        known = [key in where for key in [*keys, None]].index(False)
        assert ids == [where[key] for key in keys[:known]]
        self.held.append(ids)

    @invariant()
    def every_block_is_somewhere_once(self):
        if not hasattr(self, "pool"):
            return
        pool, holders = self.pool, Counter(block for table in self.held for block in table)
        assert pool._holders == [holders[block] for block in range(pool.num_blocks)]
        assert sorted([*holders, *pool._empty, *pool._kept]) == list(range(pool.num_blocks))
        assert pool._key_of == self.content
        assert not set(pool._empty) & set(self.content)
        assert set(pool._kept) <= set(self.content)


TestPoolHistory = PoolHistory.TestCase
TestPoolHistory.settings = settings(max_examples=60, stateful_step_count=40)
