"""Plot the metrics of a run: losses, IoUs, learning rate."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from samray.train.objectives import Panel


def draw_curves(lines: Sequence[dict[str, Any]], panels: Sequence[Panel]) -> bytes:
    """A PNG with four panels over the steps."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for (title, kind, names, is_log), axes in zip(panels, figure.subplots(2, 2).flat, strict=True):
        of_kind = [line for line in lines if line["kind"] == kind]
        shown = [name for name in names if any(name in line for line in of_kind)]
        for name in shown:
            points = [(line["step"], line[name]) for line in of_kind if name in line]
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 20 else None)
        axes.set(title=title, xlabel="step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if is_log and shown:
            axes.set_yscale("log")
        if shown:
            axes.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()
