"""Bringing a batch into force, and finding out whose fault it is when iptables refuses it.

A batch goes in as one input where that is quick.  What is refused without a name, or is too long for one input of the nft
variant, goes in piece by piece, halved until the Service port at fault stands alone; that one is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from proxycore.api import KernelError, ServicePortName

from .live import Live, LockHeld, RestoreRefused
from .program import Piece
from .ruleset import Ruleset
from .work import Work

FAULTS_IN_A_ROW = 12
"""So many Service ports refused with none accepted between them: it is no Service's fault."""


class Stuck(KernelError):
    """iptables refuses what no single Service port can be blamed for; the tables are as some step on the way left them."""


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
        self._in_a_row = 0
        self.operations = 0

    @property
    def failed(self) -> Mapping[ServicePortName, str]:
        """Service ports that were left out, with the reason."""
        return self._work.failed

    def bring(self) -> None:
        """Until everything is in force but what had to be left out.

        Raises Stuck, LockHeld, KernelError: `ruleset` is doubtful unless nothing was changed.
        """
        size = self._ruleset.options.chains_per_restore
        one = self._live.variant == "legacy" or self._work.chains <= size
        try:
            if not (one and self._in_one()):
                self._by_steps(size)
        except BaseException:
            self._work.give_up()
            raise
        self._work.accept()

    def _run(self, piece: Piece) -> None:
        """Raises as Live.restore; what came into force is remembered."""
        self._ruleset.doubtful = True
        try:
            self._live.restore(piece.text, piece.sections)
        except RestoreRefused as refused:
            # Nothing was done when the first table was refused.
            if len(piece.sections) == 1 or (refused.line or 1 << 30) <= len(piece.sections[0].lines) + 2:
                self._ruleset.doubtful = False
            raise
        except LockHeld:
            self._ruleset.doubtful = False
            raise
        self._ruleset.doubtful = False
        for section in piece.sections:
            self._ruleset.took(section)
        self.operations += sum(len(section.lines) for section in piece.sections)
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
                if not named:
                    return False
            else:
                break
        return True

    def _reread(self) -> None:
        """What was remembered may be the fault, and part of the input may be in force: everything is compared."""
        self._work.give_up()
        failed = self._work.failed
        self._ruleset.learn(self._live.read())
        self._work = self._make()
        for name, why in failed.items():
            self._work.exclude(name, why)

    def _left_out(self, piece: Piece, refused: RestoreRefused) -> bool:
        """Leave out whom the tool names; False: it names nobody."""
        line = piece.line(refused.line) if refused.line is not None else None
        if line is None or line.owner is None or line.owner in self._work.failed or refused.errno:
            return False
        self._blame(line.owner, refused, line.text)
        return True

    def _blame(self, name: ServicePortName, refused: RestoreRefused, line: str = "") -> None:
        self._in_a_row += 1
        if self._in_a_row > FAULTS_IN_A_ROW:
            raise Stuck(f"iptables refuses everything: {refused}", errno=refused.errno) from refused
        rule = f" (`{line[:200]}`)" if line else ""
        self._work.exclude(name, f"iptables refused its rules: {refused.said}{rule}")

    def _by_steps(self, size: int) -> None:
        self._must(self._work.frame_piece)
        for group in list(self._work.groups(size)):
            self._group(group)
        self._must(self._work.first_refusals)
        self._all(lambda: self._work.dispatch_pieces(size))
        self._all(lambda: self._work.last_pieces(size))

    def _group(self, names: Sequence[ServicePortName]) -> None:
        """Chains of these Service ports, but for those at fault."""
        while (piece := self._work.own_piece(names)) is not None:
            try:
                self._run(piece)
            except RestoreRefused as refused:
                if refused.errno:
                    raise Stuck(str(refused), errno=refused.errno) from refused
                if self._left_out(piece, refused):
                    continue
                owners = piece.owners
                if len(owners) == 1 and owners[0] not in self._work.failed:
                    self._blame(owners[0], refused)
                    continue
                if len(owners) < 2:
                    raise Stuck(str(refused), errno=refused.errno) from refused
                self._group(owners[: len(owners) // 2])
                self._group(owners[len(owners) // 2 :])
                return
            self._in_a_row = 0
            return

    def _must(self, make: Callable[[], Piece | None]) -> None:
        self._all(lambda: filter(None, (make(),)))

    def _all(self, make: Callable[[], Iterable[Piece]]) -> None:
        """All of these pieces, made anew when somebody had to be left out."""
        while True:
            for piece in make():
                try:
                    self._run(piece)
                except RestoreRefused as refused:
                    if not self._left_out(piece, refused):
                        raise Stuck(str(refused), errno=refused.errno) from refused
                    break
            else:
                return
