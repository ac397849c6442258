"""Messages of rank 0 to metrics and timeline. Never sent over the wire."""

from mellmpi.protocol.wire import message


@message
class MigrationStarted:
    """The migration of a placed request starts."""

    request_id: int
    mode: str  # "transfer", "recompute" or "split"
    src: int
    dst: int
    reason: str  # of the policy: "overflow", "drain", "stress" …
    start: int  # positions before it are computed by the destination
    num_bytes: int  # expected over the link
    predicted_s: float  # until rank 0 learns of its end
    predicted_downtime_s: float  # without a token


@message
class MigrationEnded:
    """The request has moved, or stays with its owner."""

    request_id: int
    mode: str
    src: int
    dst: int
    num_bytes: int  # received over the link
    transfer_s: float  # from header to last block; 0 for recompute
    outcome: str  # "moved", or the cause: "refused", "failed: checksum", "preempted" …


@message
class WorkerChanged:
    """A worker has entered this state."""

    worker: int
    state: str  # "starting", "active", "draining", "parking", "parked", "waking", "lost"


@message
class Preempted:
    """A request has lost its blocks and waits again."""

    request_id: int
    worker: int
