"""All messages between ranks and between the parts of one rank, and the plain data in them.

Knows nothing of the rest of the package. Units are in the comments. Fields are appended at the end,
never reordered; ranks compare `FINGERPRINT` to refuse a mixed installation.
"""

import hashlib
from dataclasses import fields
from typing import Final

from mellmpi.protocol.migration import (
    BlocksArrived,
    BlocksSent,
    DrainBlocks,
    KvFailed,
    KvPayload,
    KvReceived,
    KvRefused,
    KvReserved,
    PartComputed,
    ReceiveBlocks,
    ReceiveKv,
    SendBlocks,
    SendKv,
    Unfreeze,
)
from mellmpi.protocol.placement import (
    Assign,
    Release,
    StepReport,
)
from mellmpi.protocol.request import (
    GREEDY,
    Cancel,
    Emit,
    Rejected,
    Request,
    Sampling,
    Submit,
    TokenLogprob,
    finish_reason,
)
from mellmpi.protocol.steps import (
    Chunk,
    HostedModel,
    StepPlan,
    StepResult,
)
from mellmpi.protocol.telemetry import (
    MigrationEnded,
    MigrationStarted,
    Preempted,
    WorkerChanged,
)
from mellmpi.protocol.unions import (
    DataPlaneCommand,
    FrontEvent,
    Observation,
    OfferAnswer,
    SchedulerCommand,
    SchedulerEvent,
    WorkerCommand,
    WorkerEvent,
)
from mellmpi.protocol.wire import (
    DATA_PLANE,
    FRONT,
    OBSERVER,
    ROUNDS,
    SCHEDULER,
    TYPES,
    Address,
    decode,
    encode,
    message,
)
from mellmpi.protocol.workers import (
    GatherPart,
    GatherWhole,
    LinkProbe,
    LinkProbed,
    LinksMeasured,
    ModelKv,
    Park,
    Parked,
    RankFailed,
    Stop,
    Wake,
    WorkerLost,
    WorkerReady,
    blocks_for,
    kv_need,
)

__all__ = [
    "DATA_PLANE",
    "FINGERPRINT",
    "FRONT",
    "GREEDY",
    "OBSERVER",
    "ROUNDS",
    "SCHEDULER",
    "TYPES",
    "Address",
    "Assign",
    "BlocksArrived",
    "BlocksSent",
    "Cancel",
    "Chunk",
    "DataPlaneCommand",
    "DrainBlocks",
    "Emit",
    "FrontEvent",
    "GatherPart",
    "GatherWhole",
    "HostedModel",
    "KvFailed",
    "KvPayload",
    "KvReceived",
    "KvRefused",
    "KvReserved",
    "LinkProbe",
    "LinkProbed",
    "LinksMeasured",
    "MigrationEnded",
    "MigrationStarted",
    "ModelKv",
    "Observation",
    "OfferAnswer",
    "Park",
    "Parked",
    "PartComputed",
    "Preempted",
    "RankFailed",
    "ReceiveBlocks",
    "ReceiveKv",
    "Rejected",
    "Release",
    "Request",
    "Sampling",
    "SchedulerCommand",
    "SchedulerEvent",
    "SendBlocks",
    "SendKv",
    "StepPlan",
    "StepReport",
    "StepResult",
    "Stop",
    "Submit",
    "TokenLogprob",
    "Unfreeze",
    "Wake",
    "WorkerChanged",
    "WorkerCommand",
    "WorkerEvent",
    "WorkerLost",
    "WorkerReady",
    "blocks_for",
    "decode",
    "encode",
    "finish_reason",
    "kv_need",
    "message",
]

FINGERPRINT: Final = hashlib.sha256(
    repr(
        [(name, [(f.name, str(f.type)) for f in fields(cls)]) for name, cls in TYPES.items()]
    ).encode()
).hexdigest()[:16]
