"""The log of calls: what can be continued, by which key, for how long. Nothing is left."""

from hypothesis import given
from hypothesis import strategies as st

from mellmpi.protocol import AttachCall, CallUnknown, Cancel, Emit, OpenCall, Rejected
from mellmpi.runtime.serving.call_log import KEPT_S, ORPHAN_S, CallLog


def opened(call_id="c", ids=(1,), stream=True, owner="") -> OpenCall:
    return OpenCall(call_id, owner, "/v1/completions", b"{}", 0, stream, ids)


def emit(request_id, first, *tokens, finish=None) -> Emit:
    return Emit(request_id, first, tokens, (), finish, ())


def attach(log, call_id="c", owner="", server=1):
    return list(log.attach(server, AttachCall(call_id, owner)))


def test_a_call_can_be_continued_with_all_its_tokens():
    log, call = CallLog(), opened(ids=(1, 2))
    log.open(0, call)
    log.emitted(emit(1, 0, 5, 6), now=1.0)
    log.emitted(emit(2, 0, 7), now=1.0)
    log.emitted(emit(1, 2, 8, finish="stop"), now=2.0)
    assert attach(log) == [call, emit(1, 0, 5, 6, 8, finish="stop"), emit(2, 0, 7)]
    assert log.servers(2) == {0, 1}


def test_a_continued_call_has_the_logprobs_of_prompt_and_answer():
    log, call = CallLog(), opened()
    rows, scored = ((-0.5, (), ()), (-1.5, (), ())), (((-2.5, (), ()), 7),)
    log.open(0, call)
    log.emitted(Emit(1, 0, (5,), rows[:1], None, scored), now=1.0)
    log.emitted(Emit(1, 1, (6,), rows[1:], None, ()), now=1.0)
    assert attach(log) == [call, Emit(1, 0, (5, 6), rows, None, scored)]


def test_only_its_owner_can_continue_a_call():
    log = CallLog()
    log.open(0, opened(owner="ada"))
    assert attach(log, owner="bob") == [CallUnknown("c")] == attach(log, owner="")
    assert attach(log, owner="ada")[0].owner == "ada"


def test_a_call_is_forgotten_a_minute_after_its_end():
    log = CallLog()
    log.open(0, opened())
    log.emitted(emit(1, 0, 5, finish="length"), now=10.0)
    assert log.expire(10.0 + KEPT_S - 0.1) == [] and len(attach(log)) == 2
    assert log.expire(10.0 + KEPT_S) == [] and attach(log) == [CallUnknown("c")]


def test_a_cancelled_call_says_so():
    log = CallLog()
    log.open(0, opened())
    log.emitted(emit(1, 0, 5), now=1.0)
    log.cancelled(1, now=2.0)
    assert isinstance(attach(log)[-1], Rejected)


def test_a_call_that_ended_by_a_stop_string_is_not_said_to_be_cut_off():
    """The API server finds the stop string again in the tokens."""
    log = CallLog()
    log.open(0, opened())
    log.emitted(emit(1, 0, 5, 6), now=1.0)
    log.cancelled(1, now=2.0, reason="stop")
    assert attach(log)[1:] == [emit(1, 0, 5, 6)]


def test_without_its_server_a_body_is_cancelled_and_a_stream_waits():
    log = CallLog()
    log.open(0, opened("body", (1,), stream=False))
    log.open(0, opened("stream", (2,)))
    assert log.server_died(0, now=5.0) == [Cancel(1, "gone")]
    assert log.expire(5.0 + ORPHAN_S - 0.1) == []
    assert log.expire(5.0 + ORPHAN_S) == [Cancel(2, "gone")]
    assert log.num_open == 0


def test_a_client_that_comes_back_in_time_keeps_its_stream():
    log = CallLog()
    log.open(0, opened())
    log.server_died(0, now=5.0)
    attach(log)
    assert log.expire(5.0 + 2 * ORPHAN_S) == [] and log.num_open == 1


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("oetcdax")), max_size=60))
def test_nothing_is_left_of_calls_that_have_ended(history):
    log, now, tokens, ended = CallLog(), 0.0, {}, set()
    for number, action in history:
        now += 1.0
        if action == "o" and number not in tokens:
            log.open(0, opened(str(number), (number,), stream=number % 2 == 0))
            tokens[number] = []
        elif action in "et" and number in tokens and number not in ended:
            finish = "stop" if action == "t" else None
            log.emitted(emit(number, len(tokens[number]), 9, finish=finish), now)
            tokens[number].append(9)
            ended |= {number} if finish else set()
        elif action == "c" and number in tokens:
            log.cancelled(number, now)
            ended.add(number)
        elif action == "d":
            ended |= {cancel.request_id for cancel in log.server_died(0, now)}
        elif action == "a" and number in tokens:
            replies = attach(log, str(number), server=0)
            logged = [t for reply in replies if isinstance(reply, Emit) for t in reply.tokens]
            assert logged == tokens[number] or replies == [CallUnknown(str(number))]
        elif action == "x":
            ended |= {cancel.request_id for cancel in log.expire(now)}
        assert log.num_open == len(tokens.keys() - ended)
    for number in tokens.keys() - ended:
        log.cancelled(number, now)
    log.expire(now + KEPT_S)
    assert not log._calls and not log._answers and not log._ended
