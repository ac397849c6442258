"""A request changes its worker: between the machines, and to the data plane of a worker."""

from mellmpi.protocol.request import Request, TokenLogprob
from mellmpi.protocol.wire import message


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
