"""The block pool: an allocated block is held, and a held block is not allocated again."""

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
    assert pool.num_free == 4  # every test frees the blocks that it allocates


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_a_partly_filled_block_counts_as_a_whole_block(tokens, blocks):
    assert blocks_for(tokens, 4) == blocks


def test_a_key_depends_on_the_tokens_of_the_block_and_on_all_before():
    first, other = block_key(b"", (1, 2)), block_key(b"", (1, 3))
    assert first == block_key(b"", (1, 2)) != other
    assert block_key(first, (5, 6)) != block_key(other, (5, 6))


def test_a_refused_allocation_changes_nothing(pool):
    assert pool.allocate(5) is None and pool.num_free == 4


def test_no_block_is_allocated_twice(pool):
    a, b = pool.allocate(2), pool.allocate(2)
    assert sorted(a + b) == [0, 1, 2, 3]
    pool.free(a + b)


def test_a_block_freed_twice_is_a_bug(pool):
    ids = pool.allocate(1)
    pool.free(ids)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(ids)


def test_only_held_blocks_can_be_registered(pool):
    with pytest.raises(AssertionError, match="not held"):
        pool.register(0, b"k")


def cached(pool, *keys):
    """Returns a cached block for each of these keys, freed in this order."""
    ids = pool.allocate(len(keys))
    for block, key in zip(ids, keys, strict=True):
        pool.register(block, key)
    for block in ids:
        pool.free([block])
    return ids


def test_a_known_prefix_is_shared_up_to_the_first_unknown_block(pool):
    a, b, c = cached(pool, b"a", b"b", b"c")
    assert pool.share([b"a", b"b", b"x", b"c"]) == [a, b]
    assert pool.is_held(a) and pool.is_held(b) and not pool.is_held(c)
    pool.free([a, b])


def test_a_block_held_twice_is_free_when_both_holders_have_freed_it(pool):
    [a] = cached(pool, b"a")
    assert pool.share([b"a"]) == pool.share([b"a"]) == [a]
    assert pool.num_free == 3
    pool.free([a])
    assert pool.num_free == 3
    pool.free([a])


def test_cached_blocks_are_evicted_last_and_the_least_recently_freed_first(pool):
    a, b = cached(pool, b"a", b"b")
    ids = pool.allocate(3)
    assert a in ids and b not in ids
    assert pool.share([b"a"]) == [] and pool.share([b"b"]) == [b]
    pool.free([*ids, b])


def test_of_one_sequence_the_tail_is_evicted_before_the_prefix(pool):
    ids = pool.allocate(2)
    pool.register(ids[0], b"prefix")
    pool.register(ids[1], b"tail")
    pool.free(ids)
    others = pool.allocate(3)
    assert pool.share([b"prefix"]) == [ids[0]] and pool.share([b"tail"]) == []
    pool.free([*others, ids[0]])


def test_of_blocks_with_equal_content_the_first_is_shared(pool):
    a, b = pool.allocate(2)
    pool.register(a, b"k")
    pool.register(b, b"k")
    pool.free([b])
    assert pool.share([b"k"]) == [a]
    pool.free([a, a])
    assert pool.allocate(4) is not None
    pool.free([0, 1, 2, 3])


def test_the_content_of_a_block_is_registered_once(pool):
    ids = pool.allocate(1)
    pool.register(ids[0], b"first")
    pool.register(ids[0], b"second")
    pool.free(ids)
    assert pool.share([b"second"]) == []


class PoolHistory(RuleBasedStateMachine):
    """Random allocations, registrations, shares and frees: each block is in exactly one place."""

    @initialize(num_blocks=st.integers(1, 8))
    def make(self, num_blocks):
        self.pool, self.held = BlockPool(num_blocks), []
        self.content = {}  # block -> its registered key

    @rule(n=st.integers(0, 9))
    def allocate(self, n):
        free = self.pool.num_free
        ids = self.pool.allocate(n)
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
    def free(self, data):
        self.pool.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), key=st.sampled_from([b"a", b"b", b"c"]))
    def register(self, data, key):
        block = data.draw(st.sampled_from(sorted({b for table in self.held for b in table})))
        self.pool.register(block, key)
        if block not in self.content and key not in self.content.values():
            self.content[block] = key

    @rule(keys=st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=3, unique=True))
    def share(self, keys):
        ids = self.pool.share(keys)
        where = {key: block for block, key in self.content.items()}
        num_known = [key in where for key in [*keys, None]].index(False)
        assert ids == [where[key] for key in keys[:num_known]]
        self.held.append(ids)

    @invariant()
    def every_block_is_somewhere_once(self):
        if not hasattr(self, "pool"):
            return
        pool, holders = self.pool, Counter(block for table in self.held for block in table)
        assert pool._ref_counts == [holders[block] for block in range(pool.num_blocks)]
        assert sorted([*holders, *pool._empty, *pool._cached]) == list(range(pool.num_blocks))
        assert pool._key_of == self.content
        assert not set(pool._empty) & set(self.content)
        assert set(pool._cached) <= set(self.content)


TestPoolHistory = PoolHistory.TestCase
TestPoolHistory.settings = settings(max_examples=60, stateful_step_count=40)
