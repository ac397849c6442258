"""A snapshot as text for a terminal: figures, a bar of KV by request for each worker, moves."""

import colorsys
import time
from typing import Any

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from mellmpi.files import visible

GOLDEN_ANGLE = 137.508  # degrees: ids that follow each other get colours far apart
MOVES = 8  # rows of the table of moves, at least if there is room for the workers
LEAST_BAR = 8  # cells
NAMES, FACTS, FEW = 24, 32, 8  # cells before a bar; after it; after it in a narrow row
WIDE = 100  # least cells of a line with all figures
COLUMN, GAP = 54, 2  # least cells of a worker beside others, and cells between them
FULL, END, MOVING, FREE, REST = "█", "▉", "▒", "·", "░"  # cells of a bar
ASCII = str.maketrans({FULL: "#", END: "|", MOVING: "=", FREE: ".", REST: ":", "→": ">", "–": "-"})
STATES = {"active": "green", "draining": "yellow", "waking": "yellow", "lost": "red"}
SPARKS = "▁▂▃▄▅▆▇█"


def draw(
    snapshot: dict[str, Any], rates: list[float], width: int, height: int | None
) -> RenderableType:
    """The whole screen.

    rates   output tokens a second of this snapshot and of those before, oldest first
    height  lines; None: as many as needed
    """
    moves = snapshot["migrations"]
    head = [_title(snapshot), *_figures(snapshot, rates), Text()]
    rows = None if height is None else max(2, height - len(head) - 2 - MOVES - 2)
    body = _workers(snapshot["workers"], width, rows)
    left = None if height is None else max(0, height - len(head) - len(body) - 4)
    tail = [Text(), _waiting(snapshot["waiting"]), Text(), *_moves(moves[:left], width)]
    return Group(*head, *body, *tail)


def plain(text: str) -> str:
    """The same text for a terminal that shows ASCII only."""
    return text.translate(ASCII).replace("·", "|").encode("ascii", "replace").decode()


def colour(request_id: int) -> str:
    """A colour that the request keeps wherever it goes."""
    hue = request_id * GOLDEN_ANGLE % 360 / 360
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, 0.62, 0.55))
    return f"#{red:02x}{green:02x}{blue:02x}"


def seconds(value: float | None) -> str:
    """A duration as people read it."""
    if value is None:
        return "–"
    if value < 1:
        return f"{value * 1e3:.{1 if value < 0.00995 else 0}f} ms"
    if value < 100:
        return f"{value:.{1 if value < 10 else 0}f} s"
    minutes = int(value // 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def size(num_bytes: float) -> str:
    """Bytes with a decimal unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.{1 if num_bytes < 10 * scale else 0}f} {unit}"
    return f"{num_bytes:.0f} B"


# --- figures ---


def _title(snapshot: dict[str, Any]) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append("mellmpi ", style="bold")
    models = ", ".join(map(visible, snapshot["models"]))
    up = seconds(snapshot["uptime_s"])
    text.append(f"{models} · {visible(snapshot['policy'])} · up {up} · ", style="dim")
    if snapshot["ready"]:
        text.append("live", style="green")
    else:
        text.append(visible(snapshot["reason"]) or "not ready", style="yellow")
    return text


def _figures(snapshot: dict[str, Any], rates: list[float]) -> list[Text]:
    active = sum(w["state"] not in ("parked", "lost") for w in snapshot["workers"])
    totals, waiting = snapshot["totals"], snapshot["waiting"]
    all_s = totals["gpu_seconds_all_on"]
    saved = f"{100 * (1 - totals['gpu_seconds'] / all_s):.0f} %" if all_s else "–"
    rate = f"{snapshot['rates']['output_tokens_per_s']:,.0f}"
    lines = (
        (
            ("", rate, f" tokens/s {_spark(rates)}"),
            ("", f"{active}", f" of {len(snapshot['workers'])} workers active"),
            ("", f"{waiting['count']:,}", " waiting"),
        ),
        (
            ("TTFT ", *_latency(snapshot["ttft_ms"])),
            ("TPOT ", *_latency(snapshot["tpot_ms"])),
            ("", saved, " of GPU-seconds saved"),
        ),
    )
    return [_line(parts) for parts in lines]


def _line(parts: tuple[tuple[str, str, str], ...]) -> Text:
    """Figures, (text before, value, text after) each."""
    text = Text(no_wrap=True, overflow="ellipsis")
    for i, (before, value, after) in enumerate(parts):
        text.append(" · " if i else "", style="dim")
        text.append(before).append(value, style="bold").append(after)
    return text


def _latency(ms: dict[str, float | None]) -> tuple[str, str]:
    """The median, and what follows it."""
    p50, p99 = ms["p50"], ms["p99"]
    if p50 is None or p99 is None:
        return "–", ""
    return seconds(p50 / 1e3), f", p99 {seconds(p99 / 1e3)}"


def _spark(rates: list[float]) -> str:
    top = max(rates, default=0.0) or 1.0
    return "".join(SPARKS[round(rate / top * (len(SPARKS) - 1))] for rate in rates)


# --- workers ---


def _workers(workers: list[dict[str, Any]], width: int, rows: int | None) -> list[Text]:
    """A line for each worker; several beside each other where there are more than rows."""
    columns = 1
    if rows is not None:
        columns = max(1, min(width // COLUMN, -(-len(workers) // rows)))
    num_lines = -(-len(workers) // columns)
    cells = (width - GAP * (columns - 1)) // columns
    lines = []
    for i in range(num_lines if rows is None else min(num_lines, rows)):
        beside = [_row(worker, cells) for worker in workers[i::num_lines]]
        lines.append(Text(" " * GAP).join(beside))
    if len(lines) < num_lines:
        hidden = len(workers) - columns * (len(lines) - 1)
        lines[-1] = Text(f"and {hidden} more workers", style="dim")
    return lines


def _row(worker: dict[str, Any], width: int) -> Text:
    """`width` cells: number, state, share of KV in use, the bar, figures."""
    state = worker["state"] + (" held" if worker["held"] else "")
    used = 100 * worker["kv_bytes"] / max(worker["kv_capacity"], 1)
    text = Text(no_wrap=True)
    text.append(f"{worker['id']:>3} ", style="bold")
    text.append(f"{visible(state):<14}", style=STATES.get(worker["state"], "dim"))
    text.append(f"{used:>4.0f}% ")
    text.append_text(bar(worker, max(LEAST_BAR, width - NAMES - (FACTS if width >= WIDE else FEW))))
    text.append(f" {_facts(worker, width)}", style="dim")
    text.truncate(width, pad=True)
    return text


def _facts(worker: dict[str, Any], width: int) -> str:
    if not worker["num_requests"] and worker["state"] != "active":
        facts = []
    elif width < WIDE:
        facts = [f"{worker['num_requests']} req"]
    else:
        step = "" if worker["step_ms"] is None else f"{worker['step_ms']:.0f} ms"
        tokens = f"{worker['tokens_per_s']:.0f} tok/s"
        facts = [f"{worker['num_requests']:>2} req", f"{tokens:>9}", f"{step:>5}"]
    return " ".join([*facts, visible(worker["host"])] if width >= WIDE else facts)


def bar(worker: dict[str, Any], cells: int) -> Text:
    """KV in use by request, oldest first, and what is free: exactly `cells` cells."""
    whole = max(worker["kv_capacity"], worker["kv_bytes"], 1)
    text, used, at = Text(), 0, 0
    for request in sorted(worker["requests"], key=lambda r: int(r["id"])):
        used += request["kv_bytes"]
        end = round(used / whole * cells)
        if (n := end - at) > 0:
            cell = MOVING if request["state"] == "moving" else FULL
            last = END if cell is FULL else cell
            text.append(cell * (n - 1) + last, style=Style(color=colour(request["id"])))
        at = end
    rest = round(worker["kv_bytes"] / whole * cells) - at  # requests that are not listed
    if rest > 0:
        text.append(REST * rest, style="dim")
        at += rest
    return text.append(FREE * (cells - at), style="dim")


def _waiting(waiting: dict[str, Any]) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    if not waiting["count"]:
        return text.append("No request waits.", style="dim")
    text.append(f"{waiting['count']:,} waiting, the oldest for {seconds(waiting['oldest_s'])}: ")
    for request in waiting["requests"]:
        text.append(f"{request['id']} ", style=Style(color=colour(request["id"])))
    return text


# --- moves ---


def _moves(moves: list[dict[str, Any]], width: int) -> list[RenderableType]:
    if not moves:
        return [Text("No request has moved yet.", style="dim")]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    wide = width >= WIDE
    for name in ("moved at", "request", "worker", "by"):
        table.add_column(name, no_wrap=True)
    if wide:
        table.add_column("reason", no_wrap=True)
        table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("predicted", justify="right", no_wrap=True)
    table.add_column("actual", justify="right", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    for move in moves:
        moved = move["outcome"] == "moved"
        cells = [
            Text(time.strftime("%H:%M:%S", time.localtime(move["time"]))),
            Text(str(move["request"]), style=Style(color=colour(move["request"]))),
            Text(f"{move['src']} → {move['dst']}"),
            Text(visible(move["mode"])),
            *([Text(visible(move["reason"])), Text(_sent(move["bytes"]))] if wide else []),
            Text(seconds(move["predicted_s"])),
            Text(seconds(move["seconds"])),
            Text(visible(move["outcome"]), style="" if moved else "red"),
        ]
        table.add_row(*cells)
    return [table]


def _sent(num_bytes: int) -> str:
    return size(num_bytes) if num_bytes else "–"
