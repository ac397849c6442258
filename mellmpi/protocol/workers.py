"""Messages about the life of workers and of the job: start, parking, loss, gathers, links."""

from mellmpi.protocol.wire import message


@message
class ModelKv:
    """The KV geometry of one model on one worker."""

    model: str
    block_size: int  # tokens a block
    block_bytes: int  # bytes of one block, all layers


def blocks_for(num_tokens: int, block_size: int) -> int:
    """The number of blocks that hold `num_tokens` positions."""
    return -(-num_tokens // block_size)  # ceiling division


def kv_need(kv: ModelKv, num_tokens: int) -> int:
    """Bytes of KV that `num_tokens` positions occupy, in whole blocks."""
    return blocks_for(num_tokens, kv.block_size) * kv.block_bytes


@message
class WorkerReady:
    """Worker → scheduler: weights loaded and arena allocated, at start and after each Wake."""

    models: tuple[ModelKv, ...]
    capacity_bytes: int  # of the KV arena
    max_num_seqs: int  # most sequences that it decodes at once
    acked: int  # commands handled so far
    wake_s: float  # time to load, seconds
    max_batched_tokens: int  # most positions that one step computes
    target_step_s: float | None  # of a step with decodes and prompts; None: the default rule
    step_s: tuple[float, ...]  # seconds of (a step, a prefilled position, a decoded position, an
    #                            attended position), measured at the start; empty: not measured
    arithmetic: str  # workers with equal values compute bitwise equal answers


@message
class Park:
    """Scheduler → worker, which holds no request: release weights and arena."""


@message
class Parked:
    """Worker → scheduler: weights and arena are released; only `Wake` and `Stop` may follow."""

    acked: int


@message
class Wake:
    """Scheduler → worker: load weights and arena again, then answer WorkerReady."""


@message
class Stop:
    """Scheduler → worker: the job is over; leave the loop."""


@message
class WorkerLost:
    """Transport → scheduler: this worker is lost for the rest of the job."""

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

    exit_code: int  # 2: the user can correct the cause; 1: a fault
    text: str  # one line for the user, or a traceback


@message
class LinkProbe:
    """Worker → worker: answer `LinkProbed` once the blocks that follow have arrived."""

    num_blocks: int  # 0: a small message, answered at once
    done: bool  # the last probe: no answer


@message
class LinkProbed:
    """Worker → worker: the blocks of a probe have arrived."""


@message
class LinksMeasured:
    """Worker → scheduler, transport → scheduler: links between hosts, a row a direction.

    The link from worker a to worker b is the row of `(host_of[a - 1], host_of[b - 1])`. Links of
    workers that were lost meanwhile are missing. A host's link to itself is one row.
    """

    host_of: tuple[int, ...]  # host of worker 1, 2, 3 …
    srcs: tuple[int, ...]  # hosts
    dsts: tuple[int, ...]
    latency_s: tuple[float, ...]  # one way, of a small message between loops that sleep
    Bps: tuple[float, ...]  # bytes a second of blocks in flight, excluding the latency
