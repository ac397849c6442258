"""The policy's moves, taken together: who can go, in which way, and what that will take. Pure."""

from collections.abc import Iterator, Mapping, Sequence

from mellmpi.scheduler.planner import ANY, RECOMPUTE, TRANSFER, Candidate, Plan, decide
from mellmpi.scheduler.requests import Record, State
from mellmpi.scheduler.view import MoveProposal
from mellmpi.scheduler.workers import WorkerRegistry


def planned(
    moves: Sequence[MoveProposal],
    records: Mapping[int, Record],
    registry: WorkerRegistry,
    limit_s: float,
) -> Iterator[tuple[Record, MoveProposal, Plan]]:
    """Those that go now, in the order of the policy."""
    going: list[tuple[Record, MoveProposal, Candidate]] = []
    chosen: set[int] = set()
    for move in moves:
        record = records.get(move.request_id)
        if record is None or record.state is not State.RUNNING or record.worker == move.dst:
            continue
        if record.plan is not None:
            continue  # it was to be computed elsewhere, and has had no token from there yet
        modes = _modes(record, move)
        if modes and move.request_id not in chosen:
            chosen.add(move.request_id)
            going.append((record, move, _candidate(record, move, modes, registry)))
    plans = decide([c for _, _, c in going], registry.estimates, registry.in_flight, limit_s)
    for (record, move, _), plan in zip(going, plans, strict=True):
        if plan is not None:
            yield record, move, plan


def _modes(record: Record, move: MoveProposal) -> tuple[str, ...]:
    """The ways that are open to it."""
    if not record.settled:
        # Computing it once more before it has got anywhere could go on for ever.
        return () if record.transfer_failed else (TRANSFER,)
    if record.transfer_failed:
        return (RECOMPUTE,)
    return (move.mode,) if move.mode is not None else ANY


def _candidate(
    record: Record, move: MoveProposal, modes: tuple[str, ...], registry: WorkerRegistry
) -> Candidate:
    src, _ = record.owner
    kv = registry.models[record.request.model]
    return Candidate(
        src=src,
        dst=move.dst,
        num_tokens=record.num_tokens,
        block_size=kv.block_size,
        block_bytes=kv.block_bytes,
        num_decoding=int(registry.ledger.num_requests[move.dst]),
        queued_tokens=registry.queued_tokens(move.dst),
        modes=modes,
        forced=move.mode is not None,
    )
