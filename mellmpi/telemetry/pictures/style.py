"""Colours and line styles of the timeline.

Colours are distinguishable to colour-blind readers, and every kind of mark also has a shape of its
own, so that a grey print can be read.
"""

from matplotlib.axes import Axes

INK, MUTED, RULE = "#1A1A1A", "#6B6B6B", "#D4D4D4"
KV_FILL, KV_EDGE = "#A9D0E6", "#2C7FB8"
PREEMPTED, HATCH = "#AA3377", "#C4C4C4"
LineStyle = str | tuple[float, tuple[float, ...]]
MODES: dict[str, tuple[str, LineStyle]] = {  # mode of migration -> colour, line style
    "transfer": (INK, "solid"),
    "recompute": ("#D55E00", (0, (3, 1.5))),
    "split": ("#00795C", (0, (4, 1.5, 1, 1.5))),
}
SHADES = {  # worker state -> background, hatch; "active" has none
    "starting": ("#F2F2F2", ""),
    "waking": ("#FFF1B8", ""),
    "draining": ("#FFF1B8", ""),
    "parking": ("#FFF1B8", ""),
    "parked": ("#E9E9E9", "////"),
    "lost": ("#E9E9E9", "xxxx"),
}


def hide_frame(axes: Axes) -> None:
    """Leave only the bottom line of the frame, without tick marks."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(length=0, colors=MUTED, labelsize=9)
