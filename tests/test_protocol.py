"""Messages and their wire form."""

import dataclasses
import typing
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mellmpi import protocol
from mellmpi.protocol import (
    GREEDY,
    TYPES,
    Assign,
    Emit,
    KvPayload,
    Request,
    Sampling,
    StepReport,
    Submit,
    decode,
    encode,
)

LOGPROB = st.tuples(
    st.floats(-9, 0), st.lists(st.integers(0, 9)).map(tuple), st.lists(st.floats(-9, 0)).map(tuple)
)


def values(hint: object) -> st.SearchStrategy:
    """A strategy for the values of a field of this type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and hint in TYPES.values():
        return messages(hint)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(values(args[0]), max_size=4).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, args))
    if args:  # a union
        return st.one_of(*map(values, args))
    return {
        int: st.integers(-(2**63), 2**64 - 1),
        float: st.floats(allow_nan=False),
        str: st.text(),
        bool: st.booleans(),
        type(None): st.none(),
        bytes: st.binary(),
    }[hint]


def messages(cls: type) -> st.SearchStrategy:
    hints = typing.get_type_hints(cls)
    return st.builds(cls, *(values(hints[field.name]) for field in fields(cls)))


@pytest.mark.parametrize("name", TYPES)
def test_every_message_survives_the_wire(name):
    @settings(max_examples=20, derandomize=True, database=None, deadline=None)
    @given(messages(TYPES[name]))
    def survives(message):
        assert decode(encode(message)) == message

    survives()


SAMPLING = replace(GREEDY, seed=2**64 - 1)
REQUEST = Request(1, "m", (5, 6), SAMPLING, None, 0, None)


def test_nested_messages_keep_their_types():
    order = decode(encode(Assign(REQUEST, 3, (7,))))
    assert type(order.request) is Request and type(order.request.sampling) is Sampling
    assert decode(encode(Submit(REQUEST))) == Submit(REQUEST)


def test_sequences_come_back_as_tuples():
    report = StepReport(1, 0.1, 0, 2, 100, 3, [1], [2], [0], [2], [7, 8], [], [[1, 2]], 0, [], [])
    back = decode(encode(report))
    assert back.tokens == (7, 8) and back.preempted == ((1, 2),)


def test_messages_are_frozen_and_slotted():
    for cls in TYPES.values():
        assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
        assert not hasattr(cls, "__dict__") or "__slots__" in vars(cls)
    with pytest.raises(dataclasses.FrozenInstanceError):
        REQUEST.id = 2


def test_an_unknown_tag_is_refused():
    with pytest.raises(KeyError):
        decode(b"\x91\xa7Nothing")


def test_messages_have_no_defaults():
    for cls in TYPES.values():
        for field in fields(cls):
            assert field.default is field.default_factory is dataclasses.MISSING, (cls, field.name)


def test_only_addresses_of_ranks_are_numbers():
    assert protocol.SCHEDULER == 0
    names = {protocol.FRONT, protocol.OBSERVER, protocol.DATA_PLANE}
    assert len(names) == 3 and all(isinstance(name, str) for name in names)


def test_the_fingerprint_is_16_hexadecimal_digits():
    assert len(protocol.FINGERPRINT) == 16
    assert int(protocol.FINGERPRINT, 16) >= 0
    assert {Emit, KvPayload, Sampling} <= set(TYPES.values())
