"""Rules in several spellings each, for tests: all of a group mean the same, and no two groups do."""

from __future__ import annotations

COMMON: tuple[tuple[str, ...], ...] = (
    (
        "-p tcp -j RETURN",
        "-p 6 -j RETURN",
        "--protocol TCP -j RETURN",
        "-p tcp -m tcp -j RETURN",
    ),
    ("! -p tcp -j RETURN", "-p ! tcp -j RETURN", "! --proto 6 -j RETURN"),
    ("-p all -j RETURN", "-j RETURN", "-p 0 -j RETURN", "-i + -j RETURN"),
    ("-p udp -m udp --dport 53 -j T", "-p udp --dport 53 -j T", "-p 17 --destination-port=53 -j T"),
    (
        "-p tcp -m tcp --sport 1:65535 --dport 80:90 -j T",
        "-p tcp --dport 80:90 --sport 1: -j T",
    ),
    ("-p tcp -m tcp ! --dport 80 -j T", "-p tcp --dport ! 80 -j T", "-p tcp ! --dport 80:80 -j T"),
    (
        "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j T",
        "-p tcp --syn -j T",
        "-p tcp --tcp-flags SYN,FIN,ACK,RST SYN -j T",
    ),
    ("-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -j T", "-p tcp ! --syn -j T"),
    ("-p sctp -m sctp --dport 7 -j T", "-p 132 --dport 7 -j T"),
    ("-p tcp -m multiport --dports 80,443 -j T", "-p tcp -m multiport --destination-ports 443,80 -j T"),
    (
        '-m comment --comment "a b" -j T',
        '-m comment --comment "a b" --jump T',
        '-j T -m comment --comment "a b"',
    ),
    ("-m comment --comment ab -j T", '-m comment --comment "ab" -j T', '-m comment --comment="ab" -j T'),
    ("-m comment --comment a\\b -j T", '-m comment --comment "a\\\\b" -j T'),
    ("-m comment --comment ! -j T", '-m comment --comment "!" -j T'),
    ('-m comment --comment "it\'s" -j T', "-m comment --comment it's -j T"),
    (
        "-m mark --mark 0x4000/0x4000 -j T",
        "-m mark --mark 16384/0x4000 -j T",
        "-m mark --mark 0x00004000/040000 -j T",
    ),
    ("-m mark ! --mark 0x4000/0x4000 -j T", "-m mark --mark ! 0x4000/0x4000 -j T"),
    ("-m mark --mark 0x1 -j T", "-m mark --mark 1/0xffffffff -j T"),
    ("-j MARK --set-xmark 0x4000/0x0", "-j MARK --xor-mark 0x4000", "-j MARK --xor-mark 16384"),
    (
        "-j MARK --set-xmark 0x4000/0x4000",
        "-j MARK --or-mark 0x4000",
        "-j MARK --or-mark 0x00004000",
        "-j MARK --set-mark 0x4000/0x4000",
    ),
    ("-j MARK --set-xmark 0x4000/0xffffffff", "-j MARK --set-mark 0x4000", "-j MARK --set-xmark 0x4000"),
    ("-j MARK --set-xmark 0x0/0xffffbfff", "-j MARK --and-mark 0x4000"),
    (
        "-m conntrack --ctstate RELATED,ESTABLISHED -j T",
        "-m conntrack --ctstate ESTABLISHED,RELATED -j T",
        "-m conntrack --ctstate established,related -j T",
        "-m state --state ESTABLISHED,RELATED -j T",
    ),
    (
        "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j T",
        "-m conntrack ! --ctstate DNAT,ESTABLISHED,RELATED -j T",
    ),
    ("-m addrtype --dst-type LOCAL -j T", "-m addrtype --dst-type local -j T"),
    (
        "-m addrtype ! --src-type LOCAL --dst-type LOCAL -j T",
        "-m addrtype --dst-type LOCAL ! --src-type LOCAL -j T",
    ),
    (
        "-m statistic --mode random --probability 0.33333333349 -j T",
        "-m statistic --mode random --probability 0.3333333333 -j T",
        "-m statistic --probability 0.33333333302 --mode random -j T",
    ),
    (
        "-m statistic --mode random --probability 0.50000000000 -j T",
        "-m statistic --mode random --probability 0.5 -j T",
        "-m statistic --mode random --probability .4999999998 -j T",
    ),
    ("-m statistic --mode nth --every 3 -j T", "-m statistic --mode nth --every 3 --packet 0 -j T"),
    (
        "-m recent --rcheck --seconds 9 --reap --name X --rsource -j T",
        "-m recent --name X --rcheck --reap --seconds 9 -j T",
    ),
    ("-m recent --set --name X --rdest -j T", "-m recent --name X --rdest --set -j T"),
    ("-m recent --set --name DEFAULT -j T", "-m recent --set -j T"),
    ("-g T", "--goto T"),
    ("-i veth+ -o eth0 -j T", "-o eth0 --in-interface veth+ -j T"),
    ("! -i eth0 -j T", "-i ! eth0 -j T"),
    (
        '-i e0 -p tcp -m comment --comment "c d" -m mark --mark 0x1 -m tcp --dport 80 -j T',
        '-p tcp -m tcp --dport 80 -m mark --mark 0x1 -i e0 -m comment --comment "c d" -j T',
        '-i e0 -p 6 -m mark -m comment --comment "c d" -m tcp --dport 80 --mark 1 -j T',
    ),
    ("-p tcp -m recent --set --name X -m tcp --dport 80 -j T",),
    (
        "-p tcp -m tcp --dport 80 -m recent --set --name X -j T",
        "-p tcp --dport 80 -m recent --set --name X -j T",
    ),
    ("-m limit --limit 3/min -j T",),
    ("-m limit --limit 4/min -j T",),
    ("-p esp -j T", "-p 50 -j T"),
)
"""For both families."""

IPV4: tuple[tuple[str, ...], ...] = (
    (
        "-s 10.0.0.1/32 -j T",
        "-s 10.0.0.1 -j T",
        "--src 10.0.0.1/255.255.255.255 -j T",
        "--source=10.0.0.1 -j T",
    ),
    ("-d 10.0.0.0/8 -j T", "-d 10.1.2.3/8 -j T", "--dst 10.0.0.0/255.0.0.0 -j T"),
    ("-s 10.0.0.0/255.0.255.0 -j T", "-s 10.9.0.9/255.0.255.0 -j T"),
    ("! -d 127.0.0.0/8 -j T", "-d ! 127.0.0.0/8 -j T", "! -d 127.0.0.1/8 -j T"),
    ("-s 10.0.0.1/32 -d 10.0.0.2/32 -p tcp -j T", "-p tcp -d 10.0.0.2 -s 10.0.0.1 -j T"),
    ("-s 0.0.0.0/0 -p udp -j T", "-p udp -j T", "-p udp -d 1.2.3.4/0 -j T"),
    ("-j REJECT --reject-with icmp-port-unreachable", "-j REJECT", "-j REJECT --reject-with port-unreach"),
    ("-p tcp -j REJECT --reject-with tcp-reset", "-p tcp -j REJECT --reject-with=tcp-reset"),
    ("-m recent --rcheck --name X --mask 255.255.255.255 --rsource -j T", "-m recent --rcheck --name X -j T"),
    ("-m recent --rcheck --name X --mask 255.255.255.0 --rsource -j T",),
    ("-p icmp -j T", "-p 1 -j T"),
)
IPV6: tuple[tuple[str, ...], ...] = (
    ("-s fd00::1/128 -j T", "-s FD00:0::1 -j T", "-s fd00::1/ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff -j T"),
    ("-d fd00::/16 -j T", "-d fd00:1::2/16 -j T", "-d fd00::/ffff:: -j T"),
    ("-d ::ffff:1.2.3.4/128 -j T", "-d ::ffff:102:304 -j T"),
    ("-s ::/0 -p udp -j T", "-p udp -j T"),
    ("! -d ::1/128 -j T", "! -d ::1 -j T"),
    ("-j REJECT --reject-with icmp6-port-unreachable", "-j REJECT", "-j REJECT --reject-with port-unreach"),
    (
        "-m recent --rcheck --name X --mask ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff --rsource -j T",
        "-m recent --rcheck --name X -j T",
    ),
    ("-p ipv6-icmp -j T", "-p icmpv6 -j T", "-p 58 -j T"),
)
NAT_IPV4: tuple[tuple[str, ...], ...] = (
    ("-p tcp -m tcp -j DNAT --to-destination 10.0.0.9:80", "-p tcp -j DNAT --to-destination=10.0.0.9:80"),
    (
        "-p tcp -j DNAT --to-destination 10.0.0.9:80 --random --persistent",
        "-p tcp -j DNAT --persistent --random --to-destination 10.0.0.9:80",
    ),
    ("-j MASQUERADE --random-fully",),
    (
        "-p tcp -j MASQUERADE --to-ports 1024-2048 --random",
        "-p tcp -j MASQUERADE --random --to-ports 1024-2048",
    ),
)
NAT_IPV6: tuple[tuple[str, ...], ...] = (
    ("-p tcp -m tcp -j DNAT --to-destination [fd00::9]:80", "-p tcp -j DNAT --to-destination [FD00:0::9]:80"),
    ("-p tcp -j DNAT --to-destination fd00::9", "-p tcp -j DNAT --to-destination [fd00::9]"),
)
