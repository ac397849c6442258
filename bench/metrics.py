"""How many microseconds of rank 0 do metrics and trace cost for each Emit, and what does a scrape?

500 requests on 8 workers at 40 tokens/s each; each worker reports 4 tokens of all its requests
every 0.1 s. Requests end after 200 tokens and are replaced. CPU time; the best of five runs.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from record import add_json_option, finish

from mellmpi import protocol as p
from mellmpi.telemetry import Metrics, Observers, Trace
from mellmpi.telemetry.prometheus import render

SECONDS, WORKERS, REQUESTS, TOKENS_PER_S, OUTPUTS, REPORT_S = 20.0, 8, 500, 40, 200, 0.1
PER_REPORT = round(TOKENS_PER_S * REPORT_S)  # tokens of a request
REPEATS = 5

Event = tuple[float, Any, Any, list[tuple[Any, Any]]]  # (now, source, event, commands)


def load() -> Iterator[Event]:
    """What rank 0's loop hands to its observers."""
    kv, next_id = p.ModelKv("m", 16, 64), REQUESTS
    done: list[dict[int, int]] = [{} for _ in range(WORKERS)]  # request -> tokens, by worker
    for w in range(1, WORKERS + 1):
        ready = p.WorkerReady((kv,), 1 << 20, 64, 0, 0.0, 512, None, (), "")
        yield 0.0, w, ready, [(p.OBSERVER, p.WorkerChanged(w, "active"))]
    for i in range(REQUESTS):
        yield submitted(0.0, i, i % WORKERS + 1)
        done[i % WORKERS][i] = i * OUTPUTS // REQUESTS // PER_REPORT * PER_REPORT
    for i in range(round(SECONDS / REPORT_S) * WORKERS):
        now, w = i * REPORT_S / WORKERS, i % WORKERS + 1
        yield reported(now, w, done[w - 1])
        for _ in range(sum(n >= OUTPUTS for n in done[w - 1].values())):
            yield submitted(now, next_id, w)
            done[w - 1][next_id] = 0
            next_id += 1
        done[w - 1] = {request: n for request, n in done[w - 1].items() if n < OUTPUTS}


def submitted(now: float, request_id: int, worker: int) -> Event:
    request = p.Request(request_id, "m", (1,) * 100, p.GREEDY, None, 0, None)
    return now, p.FRONT, p.Submit(request), [(worker, p.Assign(request, request_id, ()))]


def reported(now: float, worker: int, done: dict[int, int]) -> Event:
    """A report of the worker, and its Emits; counts the tokens in `done`."""
    emits: list[tuple[Any, Any]] = []
    for request_id, first in done.items():
        done[request_id] = first + PER_REPORT
        reason = "length" if done[request_id] >= OUTPUTS else None
        emits.append((p.FRONT, p.Emit(request_id, first, (7,) * PER_REPORT, (), reason, ())))
    free = 1 << 19
    report = p.StepReport(
        4, REPORT_S, 0, len(emits), free, 0, (), (), (), (), (), (), (), 0, (), ()
    )
    return now, worker, report, emits


def observe(observer: Any, events: list[Event]) -> float:
    """CPU seconds of observing them."""
    began_s = time.process_time()
    for now, source, event, commands in events:
        observer.observe(now, source, event)
        observer.commands(now, commands)
    return time.process_time() - began_s


def emit_us(make: Callable[[], Any]) -> float:
    """Microseconds an Emit, for all that is observed."""
    events = list(load())
    emits = sum(isinstance(c, p.Emit) for *_, commands in events for _, c in commands)
    return round(min(observe(make(), events) for _ in range(REPEATS)) / emits * 1e6, 3)


def scrape() -> dict[str, float]:
    """Milliseconds of one scrape, on rank 0 and where it is rendered."""
    metrics = Metrics()
    observe(metrics, list(load()))
    times = [time.process_time()]
    samples = metrics.samples(SECONDS)
    times.append(time.process_time())
    _, body = render(samples)
    times.append(time.process_time())
    rank_0_ms, render_ms = (round((b - a) * 1e3, 2) for a, b in pairwise(times))
    return {"rank_0_ms": rank_0_ms, "render_ms": render_ms, "bytes": len(body)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_json_option(parser)
    args = parser.parse_args()
    config = {"requests": REQUESTS, "workers": WORKERS, "tokens_per_emit": PER_REPORT}
    with open(os.devnull, "wb") as nowhere:
        results = {
            "emit_us": {
                "metrics": emit_us(Metrics),
                "metrics and trace": emit_us(lambda: Observers(Metrics(), Trace(nowhere.write))),
            },
            "scrape": scrape(),
        }
    finish(config, results, args.json)


if __name__ == "__main__":
    main()
