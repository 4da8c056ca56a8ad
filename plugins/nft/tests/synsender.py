"""Sends TCP SYNs to one address, each from another client: `synsender.py ADDRESS PORT COUNT FIRST`.

Runs as a process of its own, so that it and the proxy share no interpreter.  Only ever started inside a namespace whose
links end in namespaces of the same test.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
import time


def main() -> None:
    address, port, count, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    tcp = struct.pack("!HHIIBBHHH", 1024, port, 1, 0, 5 << 4, 2, 64240, 0, 0)
    if ":" in address:
        target = socket.inet_pton(socket.AF_INET6, address)
        head = struct.pack("!IHBB", 6 << 28, len(tcp), 6, 64)
        packet = bytearray(head + socket.inet_pton(socket.AF_INET6, "2001:db8:64::") + target + tcp)
        source_end, family = 24, socket.AF_INET6
    else:
        target = socket.inet_aton(address)
        head = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 64, 6, 0)
        packet = bytearray(head + socket.inet_aton("198.18.0.0") + target + tcp)
        source_end, family = 16, socket.AF_INET
    place = (address, 0)
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sending:
        for number in range(first, first + count):
            # 65,536 clients, each with one source port after the other.
            struct.pack_into("!H", packet, source_end - 2, number & 0xFFFF)
            struct.pack_into("!H", packet, len(packet) - 20, 1024 + (number >> 16))
            while True:
                try:
                    sending.sendto(packet, place)
                    break
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    time.sleep(0.001)


if __name__ == "__main__":
    main()
