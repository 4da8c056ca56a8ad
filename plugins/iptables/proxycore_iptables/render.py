"""What one Service port asks for: its chains, and its rules in the chains that all share.

    KUBE-SERVICES, KUBE-NODEPORTS
      |- cluster IP ---------------------------------> KUBE-SVC or KUBE-SVL -> KUBE-SEP: translates
      |- the others ---------------> KUBE-EXT --------^
      `- with source ranges -> KUBE-FW ^

Where a frontend's routes are as Kubernetes has them, the text is kube-proxy's.  A frontend may as well have others: then
KUBE-EXT sorts its clients by class.  What is not translated meets the rules of the filter table under its old address.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from proxycore.api import (
    Endpoint,
    Frontend,
    FrontendKind,
    PoolName,
    Route,
    Routes,
    ServiceState,
    WhenEmpty,
)

from . import names
from .balance import balancer, balancing, usable
from .rules import (
    FIREWALL,
    HEALTH_PORTS,
    NODE_PORTS,
    REFUSED,
    REFUSED_OUTSIDE,
    SERVICES,
    Entry,
    Place,
    Rule,
    Rules,
    ServiceRules,
)
from .shape import Shape
from .words import (
    ANYONE,
    LOCALHOST_COUNTER,
    MASQUERADE,
    NODE,
    Client,
    Words,
    comment,
    loopback,
    packed,
    printed,
    safe,
    source,
    words,
)

_KINDS = {
    FrontendKind.CLUSTER_IP: " cluster IP",
    FrontendKind.EXTERNAL_IP: " external IP",
    FrontendKind.LOAD_BALANCER_IP: " loadbalancer IP",
    FrontendKind.NODE_PORT: "",
}


class Answer(NamedTuple):
    """What a class of client gets: the pool, None if that is empty; then it gets `when_empty`."""

    pool: PoolName | None
    masquerade: bool
    when_empty: WhenEmpty


Answers = Sequence[tuple[Client, Answer]]
"""By class, in the order of look-up; the last holds for anyone."""


def render(state: ServiceState, shape: Shape) -> ServiceRules:
    """Everything that stands for a Service port; equal states and shapes give equal text.

    A class of client whose pool is empty is not translated, and no frontend is in nat of which that is true for all.
    """
    made = _Rendering(state, shape)
    # Frontends that outside knows come first: the plain names of chains are theirs.
    for frontend in sorted(state.frontends, key=_is_internal):
        made.frontend(frontend)
    if state.health_check_node_port is not None:
        made.health_port(state.health_check_node_port)
    chains = balancing(state, made.pools, made.masquerades, made.words, comments=shape.comments)
    chains.update(made.sorters)
    chains.update(made.walls)
    return ServiceRules(chains, {place: tuple(found) for place, found in made.entries.items()})


def _is_internal(frontend: Frontend) -> bool:
    return frontend.kind is FrontendKind.CLUSTER_IP


class _Rendering:
    """What render() has found so far.

    `pools`: those that a frontend leads to, and not empty.  `masquerades`: rules at the head of a balancing chain.
    `sorters`, `walls`: the chains KUBE-EXT and KUBE-FW.
    """

    def __init__(self, state: ServiceState, shape: Shape) -> None:
        self.state = state
        self.shape = shape
        self.words: Words = words(shape)
        self.service = safe(str(state.name))
        self.owner = names.text_of(state.name)
        self.protocol = state.name.protocol.lower()
        self.usable = {PoolName.CLUSTER: usable(state.cluster), PoolName.LOCAL: usable(state.local)}
        self.pools: dict[PoolName, tuple[Endpoint, ...]] = {}
        self.masquerades: dict[str, list[Rule]] = {}
        self.sorters: dict[str, Rules] = {}
        self.walls: dict[str, Rules] = {}
        self.entries: dict[Place, list[Entry]] = {}
        self.sorter_names: dict[tuple[Routes, bool], str] = {}
        self.wall_names: dict[tuple[str, tuple[str, ...]], str] = {}

    def frontend(self, frontend: Frontend) -> None:
        answers = self._answers(frontend.routes)
        refused = [(client, answer.when_empty) for client, answer in answers if answer.pool is None]
        ranges = frontend.source_ranges
        judge = "its source ranges"
        if ranges == ():
            self._drop_others(frontend, judge, ())
            return
        if len(refused) < len(answers):
            chain = self._chain(frontend, answers)
            if ranges is not None:
                judge = chain = self._wall(frontend, chain, ranges)
            self._dispatch(frontend, chain)
        if refused:
            self._refuse(frontend, refused)
        if ranges is not None:
            rejected = any(verdict is WhenEmpty.REJECT for _, verdict in refused)
            self._drop_others(frontend, judge, ranges if rejected else ())

    def _answers(self, routes: Routes) -> Answers:
        """Classes at the end that get the same become one."""
        local_pod = self.words.local_pod
        found: list[tuple[Client, Answer]] = []
        if local_pod is not None:
            found.append((local_pod, self._answer(routes.local_pod)))
        if local_pod != ANYONE:
            found.append((NODE, self._answer(routes.node)))
            found.append((ANYONE, self._answer(routes.outside)))
        while len(found) > 1 and found[-2][1] == found[-1][1]:
            del found[-2]
        return found

    def _answer(self, route: Route) -> Answer:
        endpoints = self.usable[route.pool]
        if not endpoints:
            pool = self.state.pool(route.pool)
            return Answer(None, False, WhenEmpty.REJECT if pool is None else pool.when_empty)
        return Answer(route.pool, route.masquerade, WhenEmpty.REJECT)

    def _leads_to(self, pool: PoolName) -> str:
        self.pools.setdefault(pool, self.usable[pool])
        return balancer(self.state, pool)

    def _chain(self, frontend: Frontend, answers: Answers) -> str:
        """Where the clients of a frontend go of which some are served."""
        internal = _is_internal(frontend)
        if internal:
            first = answers[0][1].pool
            masqueraded = _masqueraded(answers, self.words)
            if first is not None and masqueraded is not None and all(a.pool is first for _, a in answers):
                chain = self._leads_to(first)
                self._masquerade(frontend, chain, masqueraded)
                return chain
        key = (frontend.routes, internal)
        chain = self.sorter_names.get(key, "")
        if not chain:
            variant = _told(frontend.routes, internal) if self.sorter_names else ""
            chain = self.sorter_names[key] = names.external_chain(self.state.name, variant)
            self.sorters[chain] = self._sort(answers, "cluster IP" if internal else "external destinations")
        return chain

    def _masquerade(self, frontend: Frontend, chain: str, clients: Sequence[Client]) -> None:
        """For a cluster IP: the chain serves other frontends too, so the rules name the address."""
        rules = self.masquerades.setdefault(chain, [])
        for client in clients:
            rules.extend(self._at(frontend, client, " cluster IP", MASQUERADE))

    def _sort(self, answers: Answers, what: str) -> Rules:
        """The chain that leads each class of client to its pool."""
        rules: list[Rule] = []
        served = [n for n, (_, answer) in enumerate(answers) if answer.pool is not None]
        for client, answer in answers[: served[-1] + 1]:
            kind = _kind(client)
            target = f"{self.service} {what}"
            verb = "route LOCAL" if client == NODE else kind
            said = comment(f"{verb} traffic for {target}") if kind else ""
            if answer.masquerade:
                masquerade = comment(f"masquerade {kind + ' ' if kind else ''}traffic for {target}")
                rules.append(f"{client.source}{client.interface}{masquerade}{client.rest}{MASQUERADE}")
            verdict = "RETURN" if answer.pool is None else self._leads_to(answer.pool)
            rules.append(f"{client.source}{client.interface}{said}{client.rest}-j {verdict}")
        return tuple(rules)

    def _wall(self, frontend: Frontend, chain: str, ranges: tuple[str, ...]) -> str:
        """The chain that lets the source ranges through to `chain`; others leave it untranslated."""
        key = (chain, ranges)
        wall = self.wall_names.get(key, "")
        if not wall:
            variant = f" {chain} {' '.join(ranges)}" if self.wall_names else ""
            wall = self.wall_names[key] = names.firewall_chain(self.state.name, variant)
            said = comment(f"{self.service}{_KINDS[frontend.kind]}")
            dropped = comment(f"other traffic to {self.service} will be dropped by KUBE-PROXY-FIREWALL")
            self.walls[wall] = (*[f"{source(cidr)}{said}-j {chain}" for cidr in ranges], dropped.rstrip())
        return wall

    def _drop_others(self, frontend: Frontend, judge: str, spared: Sequence[str]) -> None:
        """Drop what came here untranslated, but for the source ranges `spared`: they are refused later, and heard."""
        rules: list[Rule] = []
        for cidr in spared:
            rules += self._at(
                frontend, Client(source=source(cidr)), f" traffic accepted by {judge}", "-j RETURN"
            )
        rules += self._at(frontend, ANYONE, f" traffic not accepted by {judge}", "-j DROP")
        self._enter(FIREWALL, frontend, rules)

    def _dispatch(self, frontend: Frontend, chain: str) -> None:
        place = SERVICES
        if frontend.address is not None:
            rules = self._at(frontend, ANYONE, _KINDS[frontend.kind], f"-j {chain}")
        else:
            place = NODE_PORTS
            head = f"-p {self.protocol} {comment(self.service)}-m {self.protocol} --dport {frontend.port} "
            rules = [f"{head}-j {chain}"]
            if self.shape.localhost_node_ports and self.shape.nfacct:
                counted = f"-m nfacct --nfacct-name {LOCALHOST_COUNTER} -j {chain}"
                rules.insert(0, f"-d {loopback(self.shape.family)} {head}{counted}")
        self._enter(place, frontend, rules)

    def _refuse(self, frontend: Frontend, refused: Sequence[tuple[Client, WhenEmpty]]) -> None:
        """Packets that nobody translated are of the classes refused: one verdict for all needs no match."""
        if len({verdict for _, verdict in refused}) == 1:
            refused = refused[-1:]
        rules: list[Rule] = []
        for n, (client, verdict) in enumerate(refused, 1):
            rejected = verdict is WhenEmpty.REJECT
            said = " has no endpoints" if rejected else " has no local endpoints"
            target = f"-j {self.words.refusing if rejected else 'DROP'}"
            rules += self._at(frontend, ANYONE if n == len(refused) else client, said, target)
        outside = not _is_internal(frontend)
        if outside:
            self._enter(REFUSED_OUTSIDE, frontend, rules)
        # The node's own packets pass only by the other chain, but on the way to one of its own addresses.
        if not outside or (frontend.address is not None and self._node_is_refused(frontend.routes)):
            self._enter(REFUSED, frontend, rules)

    def _node_is_refused(self, routes: Routes) -> bool:
        node = routes.local_pod if self.words.local_pod == ANYONE else routes.node
        return self._answer(node).pool is None

    def health_port(self, port: int) -> None:
        """Let a load balancer ask for this node's health, whatever else INPUT refuses."""
        said = comment(f"{self.service} health check node port")
        rule = f"-p tcp {said}-m tcp --dport {port} -j ACCEPT"
        self.entries[HEALTH_PORTS] = [Entry(b"", port, "tcp", self.owner, 0, rule)]

    def _at(self, frontend: Frontend, client: Client, said: str, target: str) -> list[Rule]:
        """Rules for packets of a client to a frontend; several where node ports are on several addresses."""
        places = self.words.node_port_destinations
        if frontend.address is not None:
            places = ((f"-d {printed(frontend.address)}{self.words.length} ", ""),)
        said = comment(f"{self.service}{said}")
        protocol, port = self.protocol, frontend.port
        return [
            f"{client.source}{at}{client.interface}-p {protocol} {said}{rest}{client.rest}"
            f"-m {protocol} --dport {port} {target}"
            for at, rest in places
        ]

    def _enter(self, place: Place, frontend: Frontend, rules: Sequence[Rule]) -> None:
        address = b"" if frontend.address is None else packed(frontend.address)
        found = self.entries.setdefault(place, [])
        for turn, rule in enumerate(rules):
            found.append(Entry(address, frontend.port, self.protocol, self.owner, turn, rule))


def _masqueraded(answers: Answers, words: Words) -> tuple[Client, ...] | None:
    """Those whom one rule can tell from the others of the same pool; None: it takes more."""
    said = [answer.masquerade for _, answer in answers]
    if not any(said):
        return ()
    if len(said) == 1:
        return (ANYONE,)
    if len(said) == 2 and said[0]:
        return (answers[0][0],)
    if len(said) == 2 and answers[0][0] == words.local_pod and words.other is not None:
        return (words.other,)
    return None


def _kind(client: Client) -> str:
    if client == ANYONE:
        return ""
    return "LOCAL" if client == NODE else "pod"


def _told(routes: Routes, internal: bool) -> str:
    """Text of routes, for the names of chains."""
    parts = (
        f"{route.pool.value}{'+' if route.masquerade else ''}"
        for route in (routes.local_pod, routes.node, routes.outside)
    )
    return f" {'internal' if internal else 'external'} {' '.join(parts)}"
