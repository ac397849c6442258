"""The policy's moves, taken together: who can go, in which way, and what that will take. Pure."""

from collections.abc import Iterator, Mapping, Sequence

from mellmpi.core.fleet import Fleet
from mellmpi.core.migration import ANY, RECOMPUTE, TRANSFER, Candidate, Plan, decide
from mellmpi.core.requests import Record, State
from mellmpi.core.view import Move


def planned(moves: Sequence[Move], records: Mapping[int, Record], fleet: Fleet,
            limit_s: float) -> Iterator[tuple[Record, Move, Plan]]:  # fmt: skip
    """Those that go now, in the order of the policy."""
    going: list[tuple[Record, Move, Candidate]] = []
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
            going.append((record, move, _candidate(record, move, modes, fleet)))
    plans = decide([c for _, _, c in going], fleet.estimates, fleet.in_flight, limit_s)
    for (record, move, _), plan in zip(going, plans, strict=True):
        if plan is not None:
            yield record, move, plan


def _modes(record: Record, move: Move) -> tuple[str, ...]:
    """The ways that are open to it."""
    if not record.settled:
        # Computing it once more before it has got anywhere could go on for ever.
        return () if record.transfer_failed else (TRANSFER,)
    if record.transfer_failed:
        return (RECOMPUTE,)
    return (move.mode,) if move.mode is not None else ANY


def _candidate(record: Record, move: Move, modes: tuple[str, ...], fleet: Fleet) -> Candidate:
    src, _ = record.owner
    kv = fleet.models[record.request.model]
    return Candidate(
        src=src, dst=move.dst, num_tokens=record.num_tokens, block_size=kv.block_size,
        block_bytes=kv.block_bytes, num_decoding=int(fleet.ledger.num_requests[move.dst]),
        queued_tokens=fleet.queued_tokens(move.dst), modes=modes,
        forced=move.mode is not None,
    )  # fmt: skip
