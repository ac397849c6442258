"""Every message that crosses a rank boundary, and the plain data that both sides of it share.

Units are in the comments. No behaviour but the wire form: `[tag, *fields]` in msgpack. Fields are
appended at the end, never reordered; `FINGERPRINT` lets ranks refuse a mixed installation.
"""

import hashlib
from dataclasses import dataclass, fields
from typing import Any, Final, TypeVar, dataclass_transform

import msgpack

T = TypeVar("T")

SCHEDULER: Final = 0  # the address of rank 0's scheduler; workers are 1, 2, 3 …
FRONT: Final = "front"  # whoever submitted the request
ROUNDS: Final = 64  # of one migration, at most; the i-th has the tag ROUNDS * dst_epoch + i
OBSERVER: Final = "observer"  # metrics and timeline: told what happened, never asked
DATA_PLANE: Final = "data plane"  # the worker's own block mover, beside its batch scheduler
Address = int | str

TYPES: dict[str, type] = {}


@dataclass_transform(frozen_default=True)
def message(cls: type[T]) -> type[T]:
    """A frozen, slotted dataclass that crosses rank boundaries as [tag, *fields]."""
    cls = dataclass(frozen=True, slots=True)(cls)
    cls.__init__ = _initializer(cls)  # type: ignore[method-assign]
    TYPES[cls.__name__] = cls
    return cls


def _initializer(cls: Any) -> Any:
    """`__init__` that fills the slots themselves.

    That of a frozen dataclass finds each of them by its name, and takes three times as long.
    """
    names = cls.__slots__
    scope = {f"fill_{name}": getattr(cls, name).__set__ for name in names}
    fills = [f"fill_{name}(self, {name})" for name in names]
    exec(f"def __init__({', '.join(['self', *names])}): {'; '.join(fills) or 'pass'}", scope)
    return scope["__init__"]


def _plain(value: Any) -> list[Any]:
    return [type(value).__name__, *(getattr(value, name) for name in value.__slots__)]


def encode(m: Any) -> bytes:
    """The wire form of a message; nested messages become nested [tag, *fields] lists."""
    data: bytes = msgpack.packb(_plain(m), default=lambda v: {"": _plain(v)})
    return data


def _nested(value: dict[str, Any]) -> Any:
    tag, *rest = value[""]
    return TYPES[tag](*rest)


def decode(data: bytes) -> Any:
    """The message that `encode` wrote. Sequences come back as tuples."""
    tag, *rest = msgpack.unpackb(data, use_list=False, object_hook=_nested)
    return TYPES[tag](*rest)


# --- what a client asked -------------------------------------------------------------------------


@message
class Sampling:
    """How the next token is chosen; all of it is fixed when the request is made."""

    max_tokens: int  # at least 1
    temperature: float  # 0: greedy
    top_k: int  # 0: off
    top_p: float  # 1: off
    min_p: float  # 0: off
    repetition_penalty: float  # 1: off; over prompt and output
    presence_penalty: float  # 0: off; over output
    frequency_penalty: float  # 0: off; over output
    seed: int  # 0 … 2**64 - 1; with the position, the only source of randomness
    stop_token_ids: tuple[int, ...]  # one of these ends the output and is its last token
    num_logprobs: int | None  # alternatives to report a token; None: no logprobs at all


@message
class Request:
    """What a client asked; immutable, and all that any worker needs to compute the answer."""

    id: int
    model: str
    prompt: tuple[int, ...]  # token ids, at least one
    sampling: Sampling
    adapter: str | None


TokenLogprob = tuple[float, tuple[int, ...], tuple[float, ...]]
"""(logprob of the token, ids of the likeliest tokens, their logprobs); natural logarithms."""


# --- front ⇄ scheduler ---------------------------------------------------------------------------


@message
class Submit:
    """Front → scheduler: serve this request."""

    request: Request


@message
class Cancel:
    """Front → scheduler: nobody waits for more tokens of this request."""

    request_id: int
    reason: str  # "stop": a stop string completed the answer; "gone": the client left


@message
class Emit:
    """Scheduler → front: new tokens of a request, in order, none twice."""

    request_id: int
    first: int  # index of the first of these tokens in the output
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]  # one a token, or empty
    finish_reason: str | None  # "stop" or "length" with the last tokens


@message
class Rejected:
    """Scheduler → front: this request can never be served here, and why."""

    request_id: int
    reason: str


# --- a worker's life -----------------------------------------------------------------------------


@message
class ModelKv:
    """The KV geometry of one model on one worker."""

    model: str
    block_size: int  # tokens a block
    block_bytes: int  # bytes of one block, all layers


@message
class WorkerReady:
    """Worker → scheduler: weights loaded and arena allocated, at start and after each Wake."""

    models: tuple[ModelKv, ...]
    capacity_bytes: int  # of the KV arena
    max_num_seqs: int  # sequences it decodes at once
    acked: int  # commands handled so far
    wake_s: float  # what loading took, seconds
    max_batched_tokens: int  # positions it computes in a step, at most
    target_step_s: float | None  # of a step with decodes and prompts; None: the default rule
    step_s: tuple[float, ...]  # seconds of (a step, a prefilled position, a decoded one, a position
    #                            looked back on), as measured at the start; empty: not measured
    arithmetic: str  # workers for which it is the same give the same answers, bit for bit


@message
class Park:
    """Scheduler → worker: you hold no request; give weights and arena back."""


@message
class Parked:
    """Worker → scheduler: done; only `Wake` and `Stop` make sense to me now."""

    acked: int


@message
class Wake:
    """Scheduler → worker: load weights and arena again, then answer WorkerReady."""


@message
class Stop:
    """Scheduler → worker: the run is over; leave the loop."""


@message
class WorkerLost:
    """Transport → scheduler: this worker will never answer again."""

    worker: int


# --- start and end of a job ----------------------------------------------------------------------


@message
class GatherPart:
    """Rank → rank 0: this rank's part of a gather."""

    data: bytes


@message
class GatherWhole:
    """Rank 0 → rank: the parts of all ranks, by rank."""

    parts: tuple[bytes, ...]


@message
class RankFailed:
    """Rank → rank 0: this rank ends because of an error."""

    exit_code: int  # 2: the user can do something about it; 1: a fault
    text: str  # one line for the user, or a traceback


# --- placement -----------------------------------------------------------------------------------


@message
class Assign:
    """Scheduler → worker: own this request. First placement, resume, recompute, recovery alike."""

    request: Request
    epoch: int
    outputs: tuple[int, ...]  # tokens already produced, from the log


@message
class Release:
    """Scheduler → worker: forget this assignment and free its blocks."""

    request_id: int
    epoch: int


@message
class StepReport:
    """Worker → scheduler: what the steps since the last report produced and freed.

    Runs are flat: run i is `counts[i]` tokens of `request_ids[i]` under `epochs[i]`, the first of
    them at output index `firsts[i]`; `tokens` holds the runs one after the other.
    """

    steps: int
    step_s: float  # wall time of the steps, the loop around them included, seconds
    prefill_tokens: int  # computed positions that were not sampled from
    decode_tokens: int  # sampled positions
    free_bytes: int  # of the KV arena, now
    acked: int  # commands handled so far
    request_ids: tuple[int, ...]
    epochs: tuple[int, ...]
    firsts: tuple[int, ...]
    counts: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[tuple[int, tuple[TokenLogprob, ...]], ...]  # (run index, one a token), sparse
    preempted: tuple[tuple[int, int], ...]  # (request id, epoch): handed back, blocks freed
    attended: int  # positions that the prefilled ones looked back on, one by one


# --- migration: the ring -------------------------------------------------------------------------


@message
class ReceiveKv:
    """Scheduler → destination: reserve blocks for this request; its KV comes from `src`."""

    request: Request
    epoch: int  # of the assignment that begins when the KV has arrived
    src: int
    num_logged: int  # output tokens in the scheduler's log: KvReceived's run starts there
    num_tokens: int  # prompt + output when this was sent: what to reserve for
    start: int  # positions before it are recomputed by the destination; 0: all travel
    outputs: tuple[int, ...]  # all that are logged, if some of it is to be recomputed


@message
class KvReserved:
    """Destination → scheduler: blocks are set aside."""

    request_id: int
    epoch: int
    start: int  # positions before it need not come: computed there, or known from others


@message
class KvRefused:
    """Destination → scheduler: no room; the source never knew."""

    request_id: int
    epoch: int


@message
class SendKv:
    """Scheduler → source: send the sequence's KV to `dst`, in rounds while it decodes on.

    It stops at a step boundary, for the last round; where `start` is not 0, after `PartComputed`.
    """

    request_id: int
    epoch: int  # the assignment being ended
    dst: int
    dst_epoch: int  # the assignment being begun
    start: int


@message
class KvPayload:
    """Source → destination: a round of `num_blocks` blocks follows on the data plane.

    Rounds of one migration are announced in order, without gaps.
    """

    request_id: int
    epoch: int  # dst_epoch
    fingerprint: str  # of the KV layout: model, dtype, shape, version
    first_block: int  # logical index of the first block that follows
    num_blocks: int
    num_computed: int  # positions whose KV is valid once all blocks are here
    outputs: tuple[int, ...]  # with the last round: all output tokens at the source
    logprobs: tuple[tuple[int, TokenLogprob], ...]  # likewise: (output index, logprob)
    last: bool  # the source has stopped; what follows completes the sequence
    tag: int  # of the block messages: see `ROUNDS`


@message
class PartComputed:
    """Destination → source: what I was to compute of a split is there; stop as soon as you can.

    Sent once, after the first header, wherever `SendKv.start` is not 0. The source decodes on
    until it comes.
    """

    request_id: int
    epoch: int  # dst_epoch


@message
class KvReceived:
    """Destination → scheduler: I own it now. The run holds tokens the scheduler may not have."""

    request_id: int
    epoch: int
    first: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    num_bytes: int  # that came over the link
    transfer_s: float  # seconds from header to last block, of all rounds


@message
class KvFailed:
    """Destination → scheduler: it did not arrive, did not fit, or was not what it claimed."""

    request_id: int
    epoch: int
    reason: str


@message
class Unfreeze:
    """Scheduler → source: the move came to nothing; decode on."""

    request_id: int
    epoch: int


# --- links, measured at the start ----------------------------------------------------------------


@message
class LinkProbe:
    """Worker → worker: answer `LinkProbed` once the blocks that follow have come."""

    num_blocks: int  # 0: a small message, answered at once
    done: bool  # the last one: no answer


@message
class LinkProbed:
    """Worker → worker: they have come."""


@message
class LinksMeasured:
    """Worker → scheduler, transport → scheduler: links between hosts, a row a direction.

    From worker a to worker b it is the row of `(host_of[a - 1], host_of[b - 1])`; links of workers
    that were lost meanwhile are not there. Both directions of a host's own link are one row.
    """

    host_of: tuple[int, ...]  # host of worker 1, 2, 3 …
    srcs: tuple[int, ...]  # hosts
    dsts: tuple[int, ...]
    latency_s: tuple[float, ...]  # one way, of a small message between loops that sleep
    Bps: tuple[float, ...]  # of blocks in flight, beyond the latency


# --- scheduler → observer (never on the wire) ----------------------------------------------------


@message
class MigrationStarted:
    """A placed request begins to move."""

    request_id: int
    mode: str  # "transfer", "recompute" or "split"
    src: int
    dst: int
    reason: str  # of the policy: "overflow", "drain", "stress" …
    start: int  # positions before it are computed by the destination
    num_bytes: int  # expected over the link
    predicted_s: float  # until its end, as rank 0 will see it
    predicted_downtime_s: float  # without a token


@message
class MigrationEnded:
    """It has moved, or stays where it was."""

    request_id: int
    mode: str
    src: int
    dst: int
    num_bytes: int  # that came over the link
    transfer_s: float  # from header to last block; 0 for recompute
    outcome: str  # "moved", or why not: "refused", "failed: checksum", "preempted" …


@message
class WorkerChanged:
    """A worker has entered this state."""

    worker: int
    state: str  # "starting", "active", "draining", "parking", "parked", "waking", "lost"


@message
class Preempted:
    """A request lost its blocks and waits again."""

    request_id: int
    worker: int


# --- batch scheduler ⇄ its own data plane (never on the wire) ------------------------------------
#
# A migration is one or more rounds, each a KvPayload and the blocks it announces under a tag of
# its own: ROUNDS * dst_epoch + round. Rounds of one pair of workers may be under way together. To
# each SendBlocks belongs exactly one ReceiveBlocks or DrainBlocks of the same tag, given in the
# order of the headers.


@message
class SendBlocks:
    """Batch scheduler → data plane: these physical blocks go to `dst` under `tag`."""

    request_id: int
    epoch: int  # of the assignment that holds the blocks
    dst: int
    tag: int
    block_ids: tuple[int, ...]


@message
class ReceiveBlocks:
    """Batch scheduler → data plane: put what comes from `src` under `tag` into these blocks."""

    request_id: int
    epoch: int
    src: int
    tag: int
    block_ids: tuple[int, ...]


@message
class DrainBlocks:
    """Batch scheduler → data plane: receive and throw away; nobody owns them here any more."""

    src: int
    tag: int
    num_blocks: int


@message
class BlocksSent:
    """Data plane → batch scheduler: the buffers are ours again (also when the peer was lost)."""

    request_id: int
    epoch: int
    round: int  # tag of the order that has ended


@message
class BlocksArrived:
    """Data plane → batch scheduler: all blocks of one header are in place, or never will be."""

    request_id: int
    epoch: int
    ok: bool
    transfer_s: float
    round: int  # tag of the order that has ended
    reason: str  # "" if ok; "checksum", "truncated", "size" (of a block), "peer lost"


# --- batch scheduler ⇄ engine (never on the wire) ------------------------------------------------


@dataclass(frozen=True, slots=True)
class HostedModel:
    """Engine → batch scheduler: a model of this worker; all share its arena's blocks."""

    kv: ModelKv
    fingerprint: str  # of the KV layout: blocks travel between workers where it is the same


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one sequence computed in one step."""

    request_id: int
    start: int  # position of the first token; KV of all before it is in place
    tokens: tuple[int, ...]  # their KV is written at start … start + len(tokens) - 1
    block_table: list[int]  # physical block of every logical one; owned by the batch scheduler
    sampling: Sampling | None  # None: this chunk ends before the sequence has caught up
    history: tuple[tuple[int, ...], list[int]]  # (prompt, outputs): for penalties


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass of one model. Sampled chunks first, in the order of their tokens."""

    model: str
    chunks: tuple[Chunk, ...]
    copies: tuple[tuple[int, int], ...]  # (from, to) physical blocks, done before the pass


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a forward pass produced: one token for each sampled chunk, in plan order."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]  # None where the request asked for none


FINGERPRINT: Final = hashlib.sha256(
    repr(
        [(name, [(f.name, str(f.type)) for f in fields(cls)]) for name, cls in TYPES.items()]
    ).encode()
).hexdigest()[:16]
