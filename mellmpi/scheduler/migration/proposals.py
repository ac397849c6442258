"""Selects the proposed moves that are possible now, and plans them together. Pure."""

from collections.abc import Iterator, Mapping, Sequence

from mellmpi.scheduler.planner import ALL_MODES, RECOMPUTE, TRANSFER, Candidate, Plan, decide
from mellmpi.scheduler.requests import Record, State
from mellmpi.scheduler.view import MoveProposal
from mellmpi.scheduler.workers import WorkerRegistry


def planned(
    moves: Sequence[MoveProposal],
    records: Mapping[int, Record],
    registry: WorkerRegistry,
    limit_s: float,
) -> Iterator[tuple[Record, MoveProposal, Plan]]:
    """The moves to start now, with their plans, in the order of `moves`.

    Only the first move of a request counts. `limit_s` bounds the seconds of bytes and computing.
    """
    selected: list[tuple[Record, MoveProposal, Candidate]] = []
    chosen: set[int] = set()  # request ids
    for move in moves:
        record = records.get(move.request_id)
        if record is None or record.state is not State.RUNNING or record.worker == move.dst:
            continue
        if record.plan is not None:
            continue  # a recompute migration without a token so far
        modes = _modes(record, move)
        if modes and move.request_id not in chosen:
            chosen.add(move.request_id)
            selected.append((record, move, _candidate(record, move, modes, registry)))
    plans = decide([c for _, _, c in selected], registry.estimates, registry.in_flight, limit_s)
    for (record, move, _), plan in zip(selected, plans, strict=True):
        if plan is not None:
            yield record, move, plan


def _modes(record: Record, move: MoveProposal) -> tuple[str, ...]:
    """The modes that are possible for the request."""
    if not record.has_progressed:
        # No recompute: without a new token in between, recomputes could follow each other forever.
        # No transfer without the logprobs of the prompt, which are not part of the KV.
        stays = record.transfer_failed or record.awaits_prompt_logprobs
        return () if stays else (TRANSFER,)
    if record.transfer_failed:
        return (RECOMPUTE,)
    return (move.mode,) if move.mode is not None else ALL_MODES


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
        queued_tokens=registry.prompts.at(move.dst),
        modes=modes,
        forced=move.mode is not None,
    )
