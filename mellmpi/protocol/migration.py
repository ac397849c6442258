"""Messages that move a request's KV: between ranks, and between a worker and its data plane.

A migration is one or more rounds. A round is a `KvPayload` and the blocks that it announces, under
the tag ROUNDS * dst_epoch + round. Rounds between one pair of workers may overlap in time. Each
`SendBlocks` is matched by exactly one `ReceiveBlocks` or `DrainBlocks` of the same tag, in the
order of the headers.
"""

from mellmpi.protocol.request import Request, TokenLogprob
from mellmpi.protocol.wire import message


@message
class ReceiveKv:
    """Scheduler → destination: reserve blocks for this request, whose KV comes from `src`."""

    request: Request
    epoch: int  # of the assignment that begins when the KV has arrived
    src: int
    num_logged: int  # output tokens in the scheduler's log: the run of KvReceived starts there
    num_tokens: int  # prompt + output when this was sent: positions to reserve blocks for
    start: int  # positions before it are recomputed by the destination; 0: all are transferred
    outputs: tuple[int, ...]  # all logged output tokens if start > 0, else empty


@message
class KvReserved:
    """Destination → scheduler: the blocks are reserved."""

    request_id: int
    epoch: int
    start: int  # positions before it are not sent: recomputed, or present as a cached prefix


@message
class KvRefused:
    """Destination → scheduler: there is no room. The source has not been asked for anything."""

    request_id: int
    epoch: int


@message
class SendKv:
    """Scheduler → source: send the sequence's KV to `dst`, in rounds, and go on decoding.

    The source stops decoding at a step boundary before the last round; if `start` is not 0, not
    before it has received `PartComputed`.
    """

    request_id: int
    epoch: int  # the assignment that ends
    dst: int
    dst_epoch: int  # the assignment that begins
    start: int


@message
class KvPayload:
    """Source → destination: header of a round; `num_blocks` blocks follow on the data plane.

    The rounds of one migration are announced in order, without gaps.
    """

    request_id: int
    epoch: int  # dst_epoch
    fingerprint: str  # of the KV layout: model, dtype, shape, version
    first_block: int  # logical index of the first block that follows
    num_blocks: int
    num_computed: int  # positions whose KV is valid once all blocks have arrived
    outputs: tuple[int, ...]  # with the last round: all output tokens at the source
    logprobs: tuple[tuple[int, TokenLogprob], ...]  # with the last round: (output index, logprob)
    last: bool  # the source has stopped decoding; this round completes the sequence
    tag: int  # of the block messages: see `ROUNDS`


@message
class PartComputed:
    """Destination → source: the recomputed part of a split is ready; send the last round soon.

    Sent once, after the first header, if `SendKv.start` is not 0. The source decodes until then.
    """

    request_id: int
    epoch: int  # dst_epoch


@message
class KvReceived:
    """Destination → scheduler: this worker owns the request now.

    The run of tokens may include tokens that the scheduler has not logged yet.
    """

    request_id: int
    epoch: int
    first: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    num_bytes: int  # received over the link
    transfer_s: float  # seconds from header to last block, summed over the rounds


@message
class KvFailed:
    """Destination → scheduler: the KV did not arrive, did not fit, or did not match its header."""

    request_id: int
    epoch: int
    reason: str


@message
class Unfreeze:
    """Scheduler → source: the migration failed; continue decoding."""

    request_id: int
    epoch: int


@message
class SendBlocks:
    """Batch scheduler → data plane: send these physical blocks to `dst` under `tag`."""

    request_id: int
    epoch: int  # of the assignment that holds the blocks
    dst: int
    tag: int
    block_ids: tuple[int, ...]


@message
class ReceiveBlocks:
    """Batch scheduler → data plane: receive blocks from `src` under `tag` into these blocks."""

    request_id: int
    epoch: int
    src: int
    tag: int
    block_ids: tuple[int, ...]


@message
class DrainBlocks:
    """Batch scheduler → data plane: receive and discard one transfer."""

    src: int
    tag: int
    num_blocks: int


@message
class BlocksSent:
    """Data plane → batch scheduler: the blocks may be written again (also if the peer was lost)."""

    request_id: int
    epoch: int
    round: int  # tag of the completed SendBlocks


@message
class BlocksArrived:
    """Data plane → batch scheduler: all blocks of one header have arrived, or the round failed."""

    request_id: int
    epoch: int
    ok: bool
    transfer_s: float
    round: int  # tag of the completed ReceiveBlocks
    reason: str  # "" if ok; "checksum", "truncated", "size" (of a block), "peer lost"
