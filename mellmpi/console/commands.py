"""The operator's commands: what each sends to the server, and what it prints."""

import sys
from collections.abc import Mapping
from typing import Any

from mellmpi.console.client import Server, ServerProblem

URL = "http://127.0.0.1:8000"


def operate(command: str, values: Mapping[str, Any]) -> int:
    """Run one command; returns the exit code. UsageError says what to type instead.

    values  of the flags and positions of the command line, by name
    """
    server = Server(values.get("url", URL), values.get("api_key"))
    try:
        if command == "top":
            from mellmpi.console.top import top  # rich takes longer to load than the rest

            return top(server, once=values.get("once", False))
        path, body, done = _order(command, values)
        server.post(path, body)
        sys.stdout.write(f"{done}\n")
        return 0
    except ServerProblem as problem:
        sys.stderr.write(f"mellmpi: {problem}\n")
        return 1


def _order(command: str, values: Mapping[str, Any]) -> tuple[str, dict[str, Any], str]:
    """(path, body, what has been ordered in words)."""
    match command:
        case "drain":
            worker = values["worker"]
            done = f"worker {worker} hands its requests to the others, then parks"
            return f"/v1/cluster/workers/{worker}/drain", {}, done
        case "undrain":
            worker = values["worker"]
            done = f"worker {worker} takes requests again"
            return f"/v1/cluster/workers/{worker}/undrain", {}, done
        case "migrate":
            request, worker = values["request"], values["worker"]
            done = f"request {request} moves to worker {worker}"
            return f"/v1/cluster/requests/{request}/migrate", {"worker": worker}, done
        case "loglevel":
            level = values["level"]
            return "/v1/cluster/loglevel", {"level": level}, f"the log level is {level}"
        case _:
            raise ValueError(command)
