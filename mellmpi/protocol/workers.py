"""The life of workers and of the job: start, parking, loss, gathers, measured links."""

from mellmpi.protocol.wire import message


@message
class ModelKv:
    """The KV geometry of one model on one worker."""

    model: str
    block_size: int  # tokens a block
    block_bytes: int  # bytes of one block, all layers


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` positions."""
    return -(-num_tokens // block_size)  # ceiling division


def kv_need(kv: ModelKv, num_tokens: int) -> int:
    """Bytes of KV that `num_tokens` positions occupy, in whole blocks."""
    return blocks_for(num_tokens, kv.block_size) * kv.block_bytes


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
