"""Rules of any Service mean what the Service says: packets are sent through them and answered as the model answers."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxycore_iptables.shape import Features, Options, shape_of

from .drawn import hosts, states
from .meaning import assert_means
from .written import written


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.sampled_from(("IPv4", "IPv6")), hosts(), st.booleans())
def test_rules_mean_what_services_say(data, family, host, comments):
    found = data.draw(states(family))
    shape = shape_of(host, family, Options(), Features(), comments=comments)
    assert_means(written(found, shape), found, family, host)
