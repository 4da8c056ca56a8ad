"""Forms of rules that went through the kernel, in both variants."""

from __future__ import annotations

import pytest

from proxycore.testing.netns import Namespace
from proxycore_iptables.normal import normal

from .spellings import COMMON, IPV4, IPV6, NAT_IPV4, NAT_IPV6
from .tables import FAMILIES, VARIANTS, Tables

pytestmark = pytest.mark.root
GROUPS = {
    ("IPv4", "filter"): (*COMMON, *IPV4),
    ("IPv4", "nat"): NAT_IPV4,
    ("IPv6", "filter"): (*COMMON, *IPV6),
    ("IPv6", "nat"): NAT_IPV6,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_written_and_what_is_printed_have_one_form(variant, family, tmp_path):
    with Namespace("normal") as namespace:
        tables = Tables(namespace, variant, family, tmp_path / "lock")
        for table in ("filter", "nat"):
            taken, refused = [], []
            for rule in (rule for group in GROUPS[family, table] for rule in group):
                lines = [f"*{table}", ":T - [0:0]", ":C - [0:0]", f"-A C {rule}", "COMMIT", ""]
                done = tables.restore("\n".join(lines), check=False)
                if done.returncode:
                    refused.append((rule, done.stderr))
                else:
                    taken.append((rule, tables.rules(table)["C"]))
            # What this version does not take, such as `-d ! X`, proves nothing; most must be taken.
            assert len(refused) < len(taken) / 10, refused
            assert [(rule, [normal(rule)]) for rule, _ in taken] == [
                (rule, [normal(each) for each in printed]) for rule, printed in taken
            ]
