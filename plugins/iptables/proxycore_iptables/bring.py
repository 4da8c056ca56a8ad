"""Bringing a batch into force, and finding out whose fault it is when iptables refuses it.

A batch goes in as one input where that is quick.  What is refused without a name, or is too long for one input of the nft
variant, goes in piece by piece, halved until the Service port at fault stands alone; that one is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from proxycore.api import KernelError, ServicePortName

from .live import Live, LockHeld, RestoreRefused
from .program import Piece
from .rules import MARKER
from .ruleset import Ruleset
from .work import Work

FAULTS_IN_ONE = 8
"""With more Service ports at fault than this, what is left goes in piece by piece."""
FAULTS_SINGLED_OUT = 40
FEW = 40
"""When so many were found at fault one by one, groups of a few are left out as they are: their turn comes again later."""
_TRIAL = f"*{MARKER.table}\n:{MARKER.chain} - [0:0]\nCOMMIT\n"
"""What any iptables that works accepts."""


class Stuck(KernelError):
    """iptables refuses what no single Service port can be blamed for; the tables are as some step on the way left them."""


def stuck(refused: RestoreRefused) -> Stuck:
    """In words for the log."""
    return Stuck(
        f"iptables refuses what no single Service can be blamed for: {refused}; the kernel's log (`dmesg`) may say more, and "
        "nothing else is to be done: the next try comes by itself",
        errno=refused.errno,
    )


class Bringer:
    """One batch for one family, on the way.  `make`: what it asks, by what the ruleset knows."""

    def __init__(
        self, ruleset: Ruleset, live: Live, make: Callable[[], Work], ran: Callable[[Piece], None]
    ) -> None:
        self._ruleset = ruleset
        self._live = live
        self._make = make
        self._work = make()
        self._ran = ran
        self._read_again = False
        self._in_a_row = 0
        self.operations = 0

    @property
    def failed(self) -> Mapping[ServicePortName, str]:
        """Service ports that were left out and keep what was in force, with the reason."""
        return {name: why for name, why in self._work.failed.items() if name not in self._work.dropped}

    @property
    def dropped(self) -> Mapping[ServicePortName, str]:
        """Service ports of which nothing is in force: what was is refused as well."""
        return {name: self._work.failed[name] for name in self._work.dropped}

    def bring(self) -> None:
        """Until everything is in force but what had to be left out.

        Raises Stuck, LockHeld, KernelError: some of it may be in force; the ruleset is doubtful or unsettled then, and the
        next batch compares everything.
        """
        size = self._ruleset.options.chains_per_restore
        if self._live.variant == "legacy":
            # There every commit carries the whole table, however short the input.
            size = sys.maxsize
        try:
            if self._work.chains > size or not self._in_one():
                self._by_steps(size)
        except BaseException:
            self._work.give_up()
            if self.operations:
                self._ruleset.unsettled = True
            raise
        self._work.accept()

    def _run(self, piece: Piece) -> None:
        """Raises as Live.restore; what came into force is remembered."""
        self._ruleset.doubtful = True
        try:
            self._live.restore(piece.text, piece.sections)
        except RestoreRefused as refused:
            # Nothing was done when the first table was refused.
            if len(piece.sections) == 1 or (refused.line or sys.maxsize) <= len(piece.sections[0].lines) + 2:
                self._ruleset.doubtful = False
            if refused.errno:
                raise stuck(refused) from refused
            raise
        except LockHeld:
            # The tool takes the lock for each table anew.
            self._ruleset.doubtful = len(piece.sections) > 1
            raise
        self._ruleset.doubtful = False
        for section in piece.sections:
            self._ruleset.took(section)
        self.operations += sum(len(section.lines) for section in piece.sections)
        self._in_a_row = 0
        self._ran(piece)

    def _in_one(self) -> bool:
        """The whole batch as one input; False: it has to go piece by piece."""
        while (piece := self._work.together()) is not None:
            try:
                self._run(piece)
            except RestoreRefused as refused:
                named = self._left_out(piece, refused)
                if self._ruleset.doubtful or not named:
                    self._reread()
                if not named or len(self._work.failed) > FAULTS_IN_ONE:
                    return False
            else:
                break
        return True

    def _by_steps(self, size: int) -> None:
        while True:
            try:
                self._all(self._work.first_refusals)
                self._all(self._work.frame_pieces)
                for group in list(self._work.groups(size)):
                    self._group(group)
                self._all(lambda: self._work.dispatch_pieces(size))
                self._all(lambda: self._work.last_pieces(size))
            except RestoreRefused as refused:
                if self._read_again:
                    raise stuck(refused) from refused
                self._reread()
            else:
                return

    def _reread(self) -> None:
        """What was remembered may be the fault, and part of the input may be in force: everything is compared."""
        self._read_again = True
        failed, dropped = dict(self._work.failed), set(self._work.dropped)
        self._work.give_up()
        self._ruleset.learn(self._live.read())
        self._work = self._make()
        for name, why in failed.items():
            self._work.exclude(name, why)
            if name in dropped:
                self._work.drop(name, why)

    def _all(self, make: Callable[[], Iterable[Piece]]) -> None:
        """All of these pieces, made anew when somebody had to be left out.  Raises RestoreRefused: nobody is named."""
        while True:
            for piece in make():
                try:
                    self._run(piece)
                except RestoreRefused as refused:
                    if not self._left_out(piece, refused):
                        raise
                    break
            else:
                return

    def _group(self, names: Sequence[ServicePortName]) -> None:
        """Chains of these Service ports, but for those at fault."""
        while (piece := self._work.own_piece(names)) is not None:
            try:
                self._run(piece)
            except RestoreRefused as refused:
                if self._left_out(piece, refused):
                    continue
                owners = piece.owners
                if not owners:
                    raise
                few = len(owners) <= FEW and len(self._work.failed) >= FAULTS_SINGLED_OUT
                if len(owners) == 1 or few:
                    for owner in owners:
                        self._blame(owner, refused)
                    continue
                self._group(owners[: len(owners) // 2])
                self._group(owners[len(owners) // 2 :])
            return

    # -- blame --

    def _left_out(self, piece: Piece, refused: RestoreRefused) -> bool:
        """Leave out whom the tool names; False: it names nobody who can be at fault."""
        line = piece.line(refused.line) if refused.line is not None else None
        if line is None or line.owner is None or line.owner in self._work.dropped:
            return False
        if line.text.startswith(("-I ", "-D ")) and not self._read_again:
            # Whether these fit depends on what others did to the chain.
            return False
        self._blame(line.owner, refused, line.text)
        return True

    def _blame(self, name: ServicePortName, refused: RestoreRefused, line: str = "") -> None:
        self._in_a_row += 1
        if self._in_a_row in (1, FAULTS_IN_ONE):
            self._try_anything(refused)
        rule = (
            f" (`{line[:200]}`)"
            if line
            else " (which rule of it is not told; the kernel's log, `dmesg`, may say more)"
        )
        why = f"iptables refused its rules: {refused.said}{rule}"
        if name in self._work.failed:
            self._work.drop(name, f"{why}; what was in force is refused as well")
        else:
            self._work.exclude(name, why)

    def _try_anything(self, refused: RestoreRefused) -> None:
        """Raises Stuck: iptables accepts nothing at all, which is no Service's fault."""
        try:
            self._live.restore(_TRIAL, ())
        except RestoreRefused as also:
            raise stuck(also) from refused
