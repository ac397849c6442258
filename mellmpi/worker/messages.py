"""Unions of the messages that a batch scheduler handles and sends."""

from mellmpi.protocol import (
    Address,
    Assign,
    BlocksArrived,
    BlocksSent,
    DataPlaneCommand,
    KvPayload,
    OfferAnswer,
    Park,
    Parked,
    PartComputed,
    ReceiveKv,
    Release,
    SendKv,
    Unfreeze,
)

BlockResult = BlocksSent | BlocksArrived
"""Data plane → batch scheduler."""

PeerMessage = KvPayload | PartComputed
"""Worker → worker."""

BatchEvent = Assign | Release | ReceiveKv | SendKv | Unfreeze | Park | PeerMessage | BlockResult
"""Handled by a batch scheduler: `WorkerEvent` without `Wake`, which creates a new one."""

BatchCommand = OfferAnswer | Parked | PeerMessage | DataPlaneCommand
"""Sent by a batch scheduler."""

Outbox = list[tuple[Address, BatchCommand]]
"""Messages to send, in this order, each with its destination."""
