"""The nft backend beside kube-proxy's rules written by `nft -f`: the same Services, the same machine, the same minutes.

For kube-proxy only nft's own work is measured: the text is ready beforehand.  For us it is everything from the
ServiceStates to the acknowledgement.
"""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Iterator

from proxycore.changes import change
from proxycore_nft.backend import NftBackend

from . import cluster, kubeproxy
from .measure import median, settle, spent
from .nft import CONTEXT, batch_of, full_batch
from .report import Row

CHANGES = 5
_NAMES: dict[kubeproxy.Shape, str] = {"maps": "a map per Service", "chains": "a chain per endpoint"}


def run(*, full: bool) -> Iterator[Row]:
    gc.collect()
    gc.freeze()
    services = 10_000 if full else 1_000
    label = f"{services:,} x {cluster.ENDPOINTS}"
    # The bars are for 10,000 Services: kube-proxy's cost grows with the square.
    bars: dict[kubeproxy.Shape, float] = {"maps": 50, "chains": 100}
    load, one = _ours(services)
    yield Row(what=f"ours, full load, {label}", value=load, unit="s")
    yield Row(what=f"ours, one endpoint replaced, {label}", value=one * 1e3, unit="ms")
    for shape in bars:
        their_load, their_one = _theirs(services, shape)
        name = _NAMES[shape]
        yield Row(what=f"kube-proxy, {name}, full load", value=their_load, unit="s")
        yield Row(what=f"kube-proxy, {name}, one endpoint replaced", value=their_one * 1e3, unit="ms")
        yield Row(
            what=f"we are faster than {name}: full load",
            value=their_load / load,
            unit="x",
            bar=bars[shape] if full else None,
            sense=">=",
        )
        yield Row(
            what=f"we are faster than {name}: one endpoint",
            value=their_one / one,
            unit="x",
            bar=100 if full else None,
            sense=">=",
        )


def _ours(services: int) -> tuple[float, float]:
    """Seconds for the full load and for one change, medians."""
    states = [cluster.state(n) for n in range(services)]
    loads, ones = [], []
    for _ in range(3):
        settle()
        backend = NftBackend()
        backend.proxycore_backend_start(CONTEXT)
        everything = full_batch(states)
        with spent() as load:
            backend.proxycore_backend_apply(everything)
        loads.append(load.wall)
        for i in range(100):
            number = i * 97 % services
            after = cluster.state(number, shift=i + 1)
            batch = batch_of([change(after.name, states[number], after)])
            with spent() as one:
                backend.proxycore_backend_apply(batch)
            ones.append(one.wall)
        backend.proxycore_backend_stop()
        backend.proxycore_backend_cleanup(CONTEXT)
    return median(loads), median(ones)


def _theirs(services: int, shape: kubeproxy.Shape) -> tuple[float, float]:
    load = _nft(kubeproxy.load(services, shape))
    ones = [_nft(kubeproxy.replace_endpoint(i * 97 % services, shape, shift=i + 1)) for i in range(CHANGES)]
    _nft(f"delete table {kubeproxy.TABLE}\n")
    return load, median(ones)


def _nft(text: str) -> float:
    """Seconds that `nft -f` takes.  Raises CalledProcessError when it refuses."""
    data = text.encode()
    with spent() as taken:
        subprocess.run(["nft", "-f", "-"], input=data, check=True)
    return taken.wall
