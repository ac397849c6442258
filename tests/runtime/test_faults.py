"""Wrong, truncated or mislabelled KV is detected and counted, and changes no token."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest

from mellmpi.protocol import KvPayload
from mellmpi.sim.executor import expected_outputs
from mellmpi.transport.local import LocalTransport
from tests.runtime.cell import Cell, HashArena, HashEngine, ListFront, hashing, request
from tests.runtime.jobs import STRESS, TINY, Run, answers, write_requests

REQUESTS = [request(i, 1 + i % 30, 20 + i % 60) for i in range(80)]


# --- in one process, on the local transport ------------------------------------------------------


@pytest.fixture
def every_seventh():
    calls = itertools.count()
    return lambda: next(calls) % 7 == 0


def serve(cell):
    """Run a cell and check its answers. Returns the outcomes of its migrations."""
    front = ListFront(REQUESTS)
    cell.run(front)
    assert front.outputs == {r.id: expected_outputs(r) for r in REQUESTS}
    drain(cell)
    return cell.metrics.report(1.0)["migration_outcomes"]


def drain(cell):
    """Let messages in flight arrive, and check that no worker holds KV."""
    for _ in range(500):
        cell.run_once(None)
    for worker in cell.workers.values():
        if worker._engine is not None:
            batch = worker._batch
            assert not batch.sequences and not batch.lingering
            assert batch.pool.num_free == batch.pool.num_blocks
    assert not any(inbox.sends for inbox in cell.network.inboxes), "blocks that were not received"


def stressed(**options):
    return hashing(3, num_blocks=120, migrate="stress", policy="worst_fit", seed=3, **options)


def test_a_flipped_bit_is_detected_and_changes_no_token(monkeypatch, every_seventh):
    copy = LocalTransport._copy

    def flipping(self, send, receive):
        if receive.arena is not None and every_seventh():
            sent = send.arena.array.copy()
            sent[send.block_ids[0]].view("u1")[3] ^= 1
            send = replace(send, arena=HashArena(sent))
        copy(self, send, receive)

    monkeypatch.setattr(LocalTransport, "_copy", flipping)
    cell = stressed()
    cell.network.checksums = True
    outcomes = serve(cell)
    assert outcomes["failed: checksum"] > 2 and outcomes["moved"] > 2


def test_a_truncated_transfer_is_detected_and_changes_no_token(monkeypatch, every_seventh):
    send_blocks = LocalTransport.send_blocks

    def truncating(self, dst, tag, block_ids):
        cut = len(block_ids) > 1 and every_seventh()
        return send_blocks(self, dst, tag, block_ids[:-1] if cut else block_ids)

    monkeypatch.setattr(LocalTransport, "send_blocks", truncating)
    outcomes = serve(stressed())
    assert outcomes["failed: truncated"] > 2 and outcomes["moved"] > 2


def test_kv_with_a_wrong_fingerprint_is_not_used_and_changes_no_token(monkeypatch, every_seventh):
    send = LocalTransport.send

    def claiming(self, dst, message):
        if isinstance(message, KvPayload) and every_seventh():
            message = replace(message, fingerprint="another")
        send(self, dst, message)

    monkeypatch.setattr(LocalTransport, "send", claiming)
    outcomes = serve(stressed())
    assert outcomes["failed: KV layout"] > 2 and outcomes["moved"] > 2


def test_requests_move_to_a_worker_of_another_layout_by_recompute_only():
    engine = partial(HashEngine, 120)
    other = lambda: OtherLayout(120)  # noqa: E731
    cell = Cell([engine, engine, other], migrate="stress", policy="worst_fit", seed=3)
    outcomes = serve(cell)
    assert outcomes["failed: KV layout"] > 2
    moves = [
        m for m in cell.metrics.moves.records.items if 3 in (m.src, m.dst) and m.outcome == "moved"
    ]
    assert moves and {m.mode for m in moves if m.num_bytes} == set()


class OtherLayout(HashEngine):
    """Its blocks have the same size as those of other workers, but another layout."""

    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self.models = tuple(replace(model, fingerprint="another") for model in self.models)


# --- under mpirun, as a user starts it -----------------------------------------------------------


def run(num_ranks, directory, requests, *args, module="mellmpi", path=()):
    """(answers, report)"""
    out, report = directory / "out.jsonl", directory / "report.json"
    done = Run(
        num_ranks,
        *path,
        "run-batch",
        "-i",
        str(requests),
        "-o",
        str(out),
        "--report",
        str(report),
        *TINY,
        "--dtype",
        "bfloat16",
        *args,
        directory=directory,
        module=module,
    ).wait()
    assert done.code == 0, done.err
    return answers(out), json.loads(report.read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Requests, and their answers by one process, without migrations."""
    directory = tmp_path_factory.mktemp("undisturbed")
    write_requests(directory / "in.jsonl", 48, longest=160)
    return directory / "in.jsonl", run(1, directory, directory / "in.jsonl")[0]


EVERY = ("failed: checksum", "failed: truncated", "failed: KV layout", "moved")


@pytest.mark.parametrize("path", ["memory", "messages"])
def test_faults_between_processes_are_detected_and_change_no_token(path, undisturbed, tmp_path):
    requests, expected = undisturbed
    # Links are measured with transfers, too, which must not be faulty.
    checked = ("--checksums", "always", "--no-measure-links")
    outcomes: Counter[str] = Counter()
    for i in range(6):  # the number of faults of a run depends on the machine
        directory = tmp_path / str(i)
        directory.mkdir()
        found, report = run(
            4, directory, requests, *STRESS, *checked, module="tests.runtime.faulty", path=[path]
        )
        assert found == expected and len(found) == 48
        outcomes.update(report["migration_outcomes"])
        if all(outcomes[o] > 1 for o in EVERY):
            return
    raise AssertionError(f"not every fault occurred: {outcomes}")
