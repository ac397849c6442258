"""Unions of message types, one for each receiver."""

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
from mellmpi.protocol.operator import DrainWorker, MoveRequest, OperatorAnswer, UndrainWorker
from mellmpi.protocol.placement import Assign, Release, StepReport
from mellmpi.protocol.request import Cancel, Emit, Rejected, Submit
from mellmpi.protocol.telemetry import MigrationEnded, MigrationStarted, Preempted, WorkerChanged
from mellmpi.protocol.workers import LinksMeasured, Park, Parked, Wake, WorkerLost, WorkerReady

OfferAnswer = KvReserved | KvRefused | KvReceived | KvFailed
"""Destination → scheduler: answers to `ReceiveKv`."""

OperatorCommand = DrainWorker | UndrainWorker | MoveRequest
"""Front → scheduler, each answered by one `OperatorAnswer`."""

SchedulerEvent = (
    Submit
    | Cancel
    | OperatorCommand
    | StepReport
    | OfferAnswer
    | WorkerReady
    | Parked
    | WorkerLost
    | LinksMeasured
)
"""Events that the cluster scheduler on rank 0 handles."""

WorkerCommand = Assign | Release | ReceiveKv | SendKv | Unfreeze | Park | Wake
"""Scheduler → worker. Workers count these commands and acknowledge the count (`acked`)."""

WorkerEvent = WorkerCommand | KvPayload | PartComputed | BlocksArrived | BlocksSent
"""Events of a worker: commands, messages of other workers, completions of its data plane."""

DataPlaneCommand = SendBlocks | ReceiveBlocks | DrainBlocks
"""Batch scheduler → data plane of the same worker."""

FrontEvent = Emit | Rejected | OperatorAnswer
"""Scheduler → front."""

Observation = MigrationStarted | MigrationEnded | Preempted | WorkerChanged
"""Scheduler → metrics and timeline."""

SchedulerCommand = WorkerCommand | FrontEvent | Observation
"""Messages that the cluster scheduler sends."""
