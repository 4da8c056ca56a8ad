"""A batch on its way into one family's tables: which pieces of input it takes.

In the order in which packets stay served whatever comes between:

    refusals of both states -> frame, chains of Services -> dispatch and jumps -> refusals of the new state -> what is left over
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from proxycore.api import HostState, ServicePortName, ServiceState
from proxycore.kubechains import TREE, is_kube_proxys

from .dispatch import Shared
from .frame import FORWARD, frame
from .program import Draft, Piece, leaving, pieces, union
from .render import render
from .rules import MARKER, Entry, Place, Rule, Rules, ServiceRules, TableName, mark
from .ruleset import (
    GUARDED,
    NOTHING,
    Ruleset,
    count,
    entries_of,
)

REMEMBERED_ENDPOINTS = 20_000
"""Rules of batches with more endpoints than this are rendered again where they are needed, rather than kept."""


class Work:
    """What a batch asks of one family, whose ruleset is not doubtful.

    `whole`: everything is compared with what is there; otherwise only the changes are looked at.  `failed`: Service ports that
    were left out, with the reason; they keep the state that is in force, those `dropped` excepted.
    """

    def __init__(
        self,
        ruleset: Ruleset,
        changes: Mapping[ServicePortName, ServiceState | None],
        host: HostState,
        *,
        full: bool,
    ) -> None:
        self._ruleset = ruleset
        self.endpoints = ruleset.endpoints_after(changes, full)
        self.shape = ruleset.shape_for(host, self.endpoints)
        self.whole = full or ruleset.unsettled or self.shape != ruleset.shape
        self.frame = frame(self.shape) if self.whole else ruleset.frame
        self.failed: dict[ServicePortName, str] = {}
        self.dropped: set[ServicePortName] = set()
        self._touched: dict[Place, set[str]] = {}
        self._rendered: dict[ServicePortName, ServiceRules] = {}
        self._states: dict[ServicePortName, ServiceState | None] = dict(changes)
        if self.whole and not full:
            self._states = {**ruleset.states, **changes}
        self._keeps = sum(map(count, self._states.values())) <= REMEMBERED_ENDPOINTS
        self._owners: dict[Rule, ServicePortName] = {}
        self._wanted: set[str] = set()
        self._shared = ruleset.new_shared(self.frame) if self.whole else ruleset.shared
        try:
            self._stage()
        except BaseException:
            self.give_up()
            raise

    # -- what is wanted --

    def names(self) -> list[ServicePortName]:
        """Service ports that are looked at."""
        return list(self._states)

    def rules(self, name: ServicePortName) -> ServiceRules:
        """What a Service port should have."""
        known = self._rendered.get(name)
        if known is not None:
            return known
        state = self._states[name]
        if state is None:
            return NOTHING
        rules = render(state, self.shape)
        if self._keeps:
            self._rendered[name] = rules
        return rules

    def _stage(self) -> None:
        added: dict[Place, list[Entry]] = {}
        for name in list(self._states):
            try:
                rules = self.rules(name)
            except Exception as error:  # noqa: BLE001  one that cannot be put into words must not hold up the others
                self.failed[name] = f"its rules cannot be written: {error}"
                self._states[name] = self._ruleset.states.get(name)
                rules = self.rules(name)
            self._wanted.update(rules.chains)
            for place, entries in rules.entries.items():
                added.setdefault(place, []).extend(entries)
                self._owners.update({entry.rule: name for entry in entries})
        removed = {} if self.whole else entries_of(map(self._ruleset.rules_of, self._states))
        for place, shared in self._shared.items():
            shared.change(removed.get(place, ()), added.get(place, ()))

    def exclude(self, name: ServicePortName, why: str) -> None:
        """Leave a Service port out: it keeps what is in force, but for frontends that others have from this batch on."""
        kept = self._ruleset.states.get(name)
        if kept is not None:
            taken = {
                (frontend.address, frontend.port, frontend.protocol)
                for other, state in self._states.items()
                if state is not None and other != name
                for frontend in state.frontends
            }
            left = tuple(f for f in kept.frontends if (f.address, f.port, f.protocol) not in taken)
            if left != kept.frontends:
                kept = msgspec.structs.replace(kept, frontends=left)
        self._replace(name, kept)
        self.failed[name] = why

    def drop(self, name: ServicePortName, why: str) -> None:
        """Leave a Service port out altogether: nothing of it stays in force."""
        self._replace(name, None)
        self.failed[name] = why
        self.dropped.add(name)

    def _replace(self, name: ServicePortName, state: ServiceState | None) -> None:
        refused = self.rules(name)
        self._states[name] = state
        self._rendered.pop(name, None)
        self._wanted.difference_update(refused.chains)
        kept = self.rules(name)
        self._wanted.update(kept.chains)
        for place, shared in self._shared.items():
            shared.change(refused.entries.get(place, ()), kept.entries.get(place, ()))
        self._owners.update({entry.rule: name for entries in kept.entries.values() for entry in entries})

    def accept(self) -> None:
        """Everything is in force."""
        states = {} if self.whole else self._ruleset.states
        for name, state in self._states.items():
            if state is None:
                states.pop(name, None)
            else:
                states[name] = state
        for shared in self._shared.values():
            shared.accept()
        if self.failed:
            self.endpoints = sum(map(count, states.values()))
        self._ruleset.accept(states, self.shape, self.frame, self._shared, self.endpoints)
        if self.whole:
            self._ruleset.unsettled = False

    def give_up(self) -> None:
        """Forget the batch."""
        if not self.whole:
            for shared in self._shared.values():
                shared.give_up()

    # -- pieces --

    def together(self) -> Piece | None:
        """All of it as one piece; None: nothing is to be done."""
        nat = self._draft("nat")
        self._fixed(nat)
        self._own(nat, self.names())
        for chain, before, after in self._dispatch("nat"):
            self._write(nat, chain, before, after)
        self._ensure(nat)
        self._leave(nat, self._left_over("nat"))
        first, last = self._refusals()
        mangle = self._draft("mangle")
        self._leave(mangle, self._left_over("mangle"))
        return next(pieces((self._sign(), first, nat, last, mangle), together=True), None)

    def _sign(self) -> Draft:
        """Comes first: whatever is left behind if we end here is known for ours."""
        draft = Draft("nat", {} if not self.whole else self._ruleset.present["nat"])
        if self.whole and MARKER.chain not in self._ruleset.present["nat"]:
            draft.write(MARKER.chain, ())
        return draft

    def frame_pieces(self) -> Iterator[Piece]:
        """What everything else leads to."""
        nat = self._draft("nat")
        self._fixed(nat)
        yield from pieces((nat,), together=True)

    def own_piece(self, names: Iterable[ServicePortName]) -> Piece | None:
        """The chains of these Service ports."""
        nat = self._draft("nat")
        self._own(nat, names)
        return next(pieces((nat,), together=True), None)

    @property
    def chains(self) -> int:
        """About how many chains there are to look at."""
        wanted = sum(count(state) + 2 for state in self._states.values())
        if self.whole:
            return max(wanted, len(self._ruleset.present["nat"]))
        before = sum(count(self._ruleset.states.get(name)) + 2 for name in self._states)
        return max(wanted, before)

    def groups(self, size: int) -> Iterator[list[ServicePortName]]:
        """Names in groups with about so many chains."""
        group: list[ServicePortName] = []
        chains = 0
        for name, state in self._states.items():
            group.append(name)
            chains += count(state) + 2
            if chains >= size:
                yield group
                group, chains = [], 0
        if group:
            yield group

    def first_refusals(self) -> Iterator[Piece]:
        """Our mark, then refusals of both states, and forwarding of packets marked in either."""
        first, _ = self._refusals()
        yield from pieces((self._sign(), first), together=True)

    def dispatch_pieces(self, size: int) -> Iterator[Piece]:
        """Nodes of the tree in groups, then the root with the jumps."""
        nat = self._draft("nat")
        for chain, before, after in self._dispatch("nat"):
            self._write(nat, chain, before, after)
            if nat.chains >= size:
                yield from pieces((nat,), together=True)
                nat = self._draft("nat")
        self._ensure(nat)
        yield from pieces((nat,), together=True)

    def last_pieces(self, size: int) -> Iterator[Piece]:
        """Refusals of the new state alone, and what nothing leads to any more."""
        # With those of both states in force, what is left to write is the new state.
        yield from pieces(self._refusals(), together=True)
        for table in ("nat", "mangle"):
            left = self._left_over(table)
            for start in range(0, max(len(left), 1), size):
                draft = self._draft(table)
                self._leave(draft, left[start : start + size])
                yield from pieces((draft,), together=True)

    # -- their parts --

    def _draft(self, table: TableName) -> Draft:
        return Draft(table, self._ruleset.present[table])

    def _fixed(self, draft: Draft) -> None:
        if not self.whole:
            return
        for place, rules in self._ruleset.fixed(self.frame).items():
            there = place == MARKER or self._is_there(place.table, place.chain, rules)
            if place.table == draft.table and not there:
                draft.write(place.chain, rules)

    def _filter_frame(self) -> Iterator[tuple[str, Rules]]:
        """Chains of the frame in the filter table that are not as they should be."""
        for place, rules in self._ruleset.fixed(self.frame).items() if self.whole else ():
            if place.table == "filter" and not self._is_there(place.table, place.chain, rules):
                yield place.chain, rules

    def _own(self, draft: Draft, names: Iterable[ServicePortName]) -> None:
        for name in names:
            for chain, rules in self.rules(name).chains.items():
                if not self._is_there("nat", chain, rules):
                    draft.write(chain, rules, name)

    def _is_there(self, table: TableName, chain: str, rules: Rules) -> bool:
        return self._ruleset.present[table].get(chain) == mark(rules)

    def _dispatch(self, table: TableName) -> Iterator[tuple[str, Rules | None, Rules]]:
        """Shared chains of a table that are not as they should be: name, what is there if that is known, what should be."""
        for place, shared in self._shared.items():
            if place.table != table:
                continue
            for chain, (before, after) in self._pending(place, shared).items():
                self._touched.setdefault(place, set()).add(chain)
                if after is None or self._is_there(table, chain, after):
                    continue
                known = before is not None and self._is_there(table, chain, before)
                yield chain, before if known else None, after

    def _pending(self, place: Place, shared: Shared) -> dict[str, tuple[Rules | None, Rules | None]]:
        """What a shared chain's change comes to, with what was written for somebody who was left out since."""
        pending = shared.pending()
        touched = self._touched.get(place, set()) - pending.keys()
        if touched:
            chains = shared.chains()
            pending |= {chain: (None, chains.get(chain)) for chain in touched}
        return pending

    def _write(self, draft: Draft, chain: str, before: Rules | None, after: Rules) -> None:
        if before is None:
            draft.write(chain, after, self._owners)
        else:
            draft.change(chain, before, after, self._owners)

    def _ensure(self, draft: Draft) -> None:
        """Put rules that lead to us where they are missing, in order."""
        for rule in self._ruleset.missing(self.frame) if self.whole else ():
            if rule.table != draft.table:
                continue
            guarded = (rule.table, rule.chain) == GUARDED
            if guarded and not self._ruleset.has_guarded:
                draft.declare(rule.chain)
            draft.ensure(rule, at_end=guarded)

    def _refusals(self) -> tuple[Draft, Draft]:
        """The filter table, before and after dispatch changes.

        What refuses concerns untranslated packets alone: it may come early and must not leave late or early.
        """
        first = self._draft("filter")
        second: list[tuple[str, Rules, Rules]] = []
        for chain, rules in self._filter_frame():
            # Packets may carry the mark of before until the nat table has the new one.
            old = self._ruleset.forward if chain == FORWARD.chain else ()
            both = union(old, rules) if old and self._is_there("filter", chain, old) else rules
            first.write(chain, both)
            if both != rules:
                second.append((chain, both, rules))
        for chain, before, after in self._dispatch("filter"):
            both = after if before is None else union(before, after)
            self._write(first, chain, before, both)
            if both != after:
                second.append((chain, both, after))
        self._ensure(first)
        present = {**self._ruleset.present["filter"]}
        present.update({chain: known for chain, known in first.marks.items() if known is not None})
        last = Draft("filter", present)
        for chain, before, after in second:
            last.change(chain, before, after, self._owners)
        self._leave(last, self._left_over("filter"))
        return first, last

    def _left_over(self, table: TableName) -> list[str]:
        """Chains of ours or kube-proxy's that are there and not wanted, those first that lead to others."""
        present = self._ruleset.present[table]
        if self.whole:
            wanted = {place.chain for place in self._ruleset.fixed(self.frame) if place.table == table}
            for place, shared in self._shared.items():
                if place.table == table:
                    wanted.update(shared.chains())
            if table == "nat":
                wanted |= self._wanted
            gone = [chain for chain in present if chain not in wanted and is_kube_proxys(table, chain)]
        elif table == "nat":
            before = {chain for name in self._states for chain in self._ruleset.rules_of(name).chains}
            gone = [chain for chain in before - self._wanted if chain in present]
            for place, shared in self._shared.items():
                if place.table == table:
                    pending = self._pending(place, shared).items()
                    gone += [chain for chain, (_, after) in pending if after is None and chain in present]
        else:
            gone = []
        return leaving(gone, lambda chain: chain.startswith(TREE))

    def _leave(self, draft: Draft, chains: Sequence[str]) -> None:
        """Take chains away; those that rules of others lead to stay, empty."""
        if self.whole:
            for jump in self._ruleset.stale(self.frame):
                if jump.table == draft.table:
                    draft.drop(jump)
        for chain in chains:
            if (draft.table, chain) not in self._ruleset.used:
                draft.remove(chain)
            elif self._ruleset.present[draft.table].get(chain) != mark(()):
                draft.write(chain, ())
