"""The demo's picture: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .probe import DROPPED, REFUSED, Dialler, Tally

FRESH_SECONDS = 0.7
"""Who answered within this time is shown bright."""


COLUMNS = {"Service": 8, "client": 11, "dials": 19, "who answers, how often in this act": 40}
"""Title and least width of the live table's columns, but for the last, which takes what is left."""


class View(Protocol):
    """What the play tells; called on one thread."""

    def note(self, text: str) -> None:
        """One line that stays."""

    def begin(self, diallers: Sequence[Dialler]) -> None:
        """The diallers run from now on."""

    def act(self, title: str) -> None:
        """A new act begins."""

    def draw(self) -> None:
        """Called some times a second."""

    def act_done(self) -> None:
        """The act is over."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def _sees(tally: Tally) -> str:
    """Which client address the pods saw."""
    own = f"own {', '.join(sorted(tally.own.copy()))}" if tally.own else ""
    masqueraded = f"masq. {', '.join(sorted(tally.masqueraded.copy()))}" if tally.masqueraded else ""
    return "; ".join(part for part in (own, masqueraded) if part)


class PlainView:
    """Lines for a log: the whole table after each act."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._diallers: Sequence[Dialler] = ()

    def note(self, text: str) -> None:
        self._line(f"  {text}")

    def begin(self, diallers: Sequence[Dialler]) -> None:
        self._diallers = diallers

    def act(self, title: str) -> None:
        self._line(f"\n{title}")

    def draw(self) -> None:
        pass

    def act_done(self) -> None:
        for dialler in self._diallers:
            probe, tally = dialler.probe, dialler.tally
            answers = "  ".join(f"{who} {count}" for who, count in sorted(tally.recent.copy().items()))
            mark = "WRONG" if tally.wrong else "ok"
            line = f"{mark:<5} {probe.service:<21}{probe.client:<19}{probe.dials:<21}{answers}"
            self._line(f"  {line:<112}{_sees(tally)}".rstrip())

    def close(self) -> None:
        pass

    def _line(self, text: str) -> None:
        # print() and not the console's own: no wrapping, no markup.
        print(text, file=self._console.file, flush=True)


class LiveView:
    """A table that redraws itself."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._title = ""
        self._diallers: Sequence[Dialler] = ()
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def note(self, text: str) -> None:
        self._console.print(Text(f"  {text}", style="dim"))

    def begin(self, diallers: Sequence[Dialler]) -> None:
        self._diallers = diallers
        self._live.start()

    def act(self, title: str) -> None:
        self._title = title
        self._console.print(Text(f"  {title}", style="bold"))

    def draw(self) -> None:
        self._live.update(self._picture(), refresh=True)

    def act_done(self) -> None:
        self.draw()

    def close(self) -> None:
        self._live.stop()

    def _picture(self) -> Group:
        now = time.monotonic()
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=False)
        for title, width in COLUMNS.items():
            table.add_column(title, no_wrap=True, min_width=width)
        table.add_column("and sees the client as", no_wrap=True, overflow="ellipsis")
        service = ""
        for dialler in self._diallers:
            probe, tally = dialler.probe, dialler.tally
            name = probe.service.partition("/")[2] if probe.service != service else ""
            service = probe.service
            table.add_row(
                Text(name, style="bold"),
                Text.assemble(("✗", "bold red") if tally.wrong else ("✓", "green"), f" {probe.client}"),
                Text(probe.dials),
                _answers(tally, now),
                Text(_sees(tally), style="magenta" if tally.masqueraded else "dim"),
            )
        wrong = sum(len(d.tally.wrong) for d in self._diallers)
        total = sum(d.tally.answers.total() for d in self._diallers)
        state = Text(f"  {total} connections, ", style="bold")
        state.append(f"{wrong} wrong", style="bold red" if wrong else "bold green")
        state.append(f"   act {self._title}", style="bold cyan")
        return Group(Text(), table, Text(), state)


def _answers(tally: Tally, now: float) -> Text:
    text = Text()
    for who, count in sorted(tally.recent.copy().items()):
        fresh = now - tally.latest.get(who, 0.0) < FRESH_SECONDS
        colour = "yellow" if who in (REFUSED, DROPPED) else "green"
        text.append(f"{who} ", style=colour if fresh else "dim strike")
        text.append(f"{count:<4}", style="" if fresh else "dim")
    return text
