"""Output of `samray status`: a table with a bar on a terminal, plain lines elsewhere, JSON on request."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from samray.output.status import Footers, Status, run_status
from samray.text import cost_in_words, count, duration, two_columns

MAX_NAMES: Final = 20
"""Names that are listed; the masks of others are added up."""
_NAME_CHARS: Final = 40

COLOURS = {"finished": "green", "running": "cyan", "not begun": "yellow", "unmarked": "yellow", "stalled": "red"}


def show_status(
    output: str, *, watch_s: float | None = None, as_json: bool = False, gpu_price_per_hour: float | None = None
) -> None:
    """Print the progress of a run to stdout; with watch_s repeatedly, until the run is finished or Ctrl-C.

    Raises: ConfigError if output has no run, StorageError.
    """
    console = Console(highlight=False)
    # Kept from look to look, so that each footer is read once.
    footers: Footers = {}
    on_screen = console.is_terminal and not as_json
    screen = Live(console=console, auto_refresh=False) if on_screen and watch_s is not None else None
    with contextlib.suppress(KeyboardInterrupt), screen or contextlib.nullcontext():
        while True:
            status = run_status(output, footers)
            if gpu_price_per_hour is not None:
                status = replace(status, gpu_price_per_hour=gpu_price_per_hour)
            if screen is not None:
                screen.update(table(status), refresh=True)
            elif on_screen:
                console.print(table(status))
            elif as_json:
                print(json.dumps(status.to_dict()), flush=True)
            else:
                print(line(status) if watch_s is not None else plain(status), flush=True)
            if watch_s is None or status.state == "finished":
                return
            time.sleep(watch_s)


def sentence(status: Status) -> str:
    """The meaning of the state, and the next step."""
    quiet = duration(status.quiet_s) if status.quiet_s is not None else "a while"
    if status.state == "finished":
        return f"finished {ago(status.last_shard_s_ago)}: all shards and _SUCCESS are there"
    if status.state == "unmarked":
        return "all shards are there, but not _SUCCESS: the run is ending, or was stopped; the same command writes it"
    if status.state == "not begun":
        return f"not begun: the plan was made {quiet} ago, no shard was started"
    begun = f"{count(status.num_shards_begun, 'shard')} in progress"
    if status.state == "stalled":
        usual = status.usual_gap_s
        pace = f", with one shard every {duration(usual)} before" if usual is not None and usual >= 1 else ""
        return f"stalled? No activity for {quiet}{pace}; run the same command to resume"
    last = f"the last shard {ago(status.last_shard_s_ago)}" if status.num_shards_done else f"begun {quiet} ago"
    return f"running: {last}, {begun}"


def rows(status: Status) -> list[tuple[str, str]]:
    """Name and value of each line."""
    done, total = status.num_images_done, status.num_images
    lines = [
        ("state", sentence(status)),
        ("images", f"{done:,} of {total:,} ({_percent(done, total)})"),
        ("shards", f"{status.num_shards_done:,} of {status.num_shards:,}"),
    ]
    if status.num_tiles_done:
        lines.append(("tiles", f"{status.num_tiles_done:,} of large images in shards that are not done"))
    about = "about " if status.estimated else ""
    labelled = max(done - status.num_failed, 1)
    if status.num_shards_read:
        lines.append(("masks", f"{about}{status.num_masks:,}, {status.num_masks / labelled:.1f} per image"))
        if status.labels is not None:
            lines.append(("names", about + _names(status.labels, status.num_masks)))
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in status.failures.items())
        lines.append(("failed images", f"{about}{status.num_failed:,}: {reasons}" if status.num_failed else "none"))
    if status.images_per_s is not None:
        overall = status.images_per_s_overall
        since = f"; {overall:.2f} since the plan was made, including start-up and pauses" if overall is not None else ""
        lines.append(("rate", f"{status.images_per_s:.2f} images/s lately{since}"))
    if status.eta_s is not None:
        lines.append(("time left", duration(status.eta_s)))
    if status.held_seconds > 0:
        busy = min(status.device_seconds / status.held_seconds, 1.0)
        lines.append(("device", f"busy {100 * busy:.0f}% of the actors' time"))
    if status.gpu_price_per_hour is not None and done > status.num_failed:
        lines.append(("cost", about + cost_in_words(status.gpu_seconds, status.gpu_price_per_hour, labelled)))
    if status.estimated:
        read = f"{count(status.num_shards_read, 'shard')} of {status.num_shards_done:,}"
        lines.append(("estimated", f"`about` numbers are extrapolated from {read}"))
    if status.own_clock:
        lines.append(("clock", "`ago` uses this machine's clock: the storage's clock is not available"))
    return [*lines, ("output", status.output)]


def line(status: Status) -> str:
    """The status in one line, for a log."""
    # A run that is merely slow looks the same, hence the question mark.
    state = f"{status.state}?" if status.state == "stalled" else status.state
    done, total = status.num_images_done, status.num_images
    parts = [state, f"{done:,}/{total:,} images ({_percent(done, total)})"]
    if status.images_per_s is not None:
        parts.append(f"{status.images_per_s:.2f} images/s")
    if status.eta_s is not None:
        parts.append(f"{duration(status.eta_s)} left")
    if status.num_failed:
        about = "about " if status.estimated else ""
        parts.append(f"{about}{status.num_failed:,} failed")
    if status.last_shard_s_ago is not None:
        parts.append(f"last shard {ago(status.last_shard_s_ago)}")
    return ", ".join(parts)


def plain(status: Status) -> str:
    """Lines without colours or bar."""
    return "\n".join(f"{name}: {value}" for name, value in rows(status))


def table(status: Status) -> Table:
    """For a terminal."""
    grid = two_columns()
    for name, value in rows(status):
        grid.add_row(f"[bold]{name}[/bold]", Text(value, style=COLOURS[status.state] if name == "state" else ""))
    grid.add_row("", ProgressBar(total=max(status.num_images, 1), completed=status.num_images_done, width=60))
    return grid


def ago(seconds: float | None) -> str:
    """`12.3 s ago`, `at an unknown time`."""
    return "at an unknown time" if seconds is None else f"{duration(seconds)} ago"


def _names(labels: Mapping[str, int], num_masks: int) -> str:
    """Masks per name, most frequent first, and those without a name."""
    # A stable sort: names of equal frequency stay in the run's order.
    most = sorted(labels.items(), key=lambda item: -item[1])
    # Imported names are other people's text: no control characters reach the terminal.
    shown = [("".join(c if c.isprintable() else "?" for c in name[:_NAME_CHARS]), n) for name, n in most[:MAX_NAMES]]
    parts = [f"{number:,} {name}" for name, number in shown]
    if len(most) > MAX_NAMES:
        rest = most[MAX_NAMES:]
        parts.append(f"{sum(number for _, number in rest):,} of {count(len(rest), 'other name')}")
    num_unnamed = num_masks - sum(labels.values())
    return ", ".join([*parts, *[f"{num_unnamed:,} without a name"] * (num_unnamed > 0)])


def _percent(part: int, total: int) -> str:
    """Percentage, rounded down: 100% only when all is done."""
    return f"{int(1000 * part / max(total, 1)) / 10:g}%"
