"""Snapshots made by hand, in the form of `GET /v1/cluster`."""

from tests.page.scene import UNIX_S


def segment(id, kv_bytes=100, to=None, state=None):
    state = state or ("running" if to is None else "moving")
    tokens = {"prompt_tokens": 20 + id, "output_tokens": 5}
    return {"id": id, "state": state, "kv_bytes": kv_bytes, **tokens, "to": to}


def worker(id, *requests, state="active", held=False, **fields):
    return {
        "id": id,
        "host": "node01",
        "state": state,
        "held": held,
        "kv_bytes": sum(r["kv_bytes"] for r in requests),
        "kv_capacity": 1000,
        "step_ms": 20.0,
        "tokens_per_s": 50.0,
        "requests": list(requests),
        "num_requests": len(requests),
        **fields,
    }


def migration(request, src, dst, at_s, **fields):
    return {
        "time": UNIX_S + at_s,
        "request": request,
        "src": src,
        "dst": dst,
        "mode": "transfer",
        "reason": "drain",
        "bytes": 4_000_000,
        "predicted_s": 0.05,
        "seconds": 0.04,
        "outcome": "moved",
        **fields,
    }


def cluster(*workers, migrations=(), waiting=(), **fields):
    queue = [{"id": id, "prompt_tokens": 7, "waited_s": 1.5} for id in waiting]
    oldest_s = 1.5 if waiting else 0.0
    return {
        "time": UNIX_S,
        "uptime_s": 61.0,
        "version": "9.9",
        "policy": "frugal",
        "models": ["small"],
        "ready": True,
        "reason": "",
        "workers": list(workers),
        "waiting": {"count": len(queue), "oldest_s": oldest_s, "requests": queue},
        "migrations": list(migrations),
        "rates": {"output_tokens_per_s": 321.0, "requests_per_s": 2.5},
        "ttft_ms": {"p50": 120.0, "p99": 480.0},
        "tpot_ms": {"p50": 21.0, "p99": 34.0},
        "totals": {
            "requests": 9,
            "output_tokens": 900,
            "migrations": 3,
            "gpu_seconds": 60.0,
            "gpu_seconds_all_on": 100.0,
        },
        **fields,
    }


TWO = cluster(worker(1, segment(7), segment(8, 300)), worker(2, state="parked"))
