"""A throw-away certificate authority, by the `openssl` command."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Certificate(NamedTuple):
    """Files of a certificate and its key."""

    certificate: Path
    key: Path


class Authority:
    """Makes certificates in a directory; `ca` is the file that trusts them."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.ca = self.directory / "ca.crt"
        self._key = self.directory / "ca.key"
        self._count = 0
        _openssl(
            *("req", "-x509", *_KEY, "-keyout", self._key, "-out", self.ca, "-days", "2"),
            *("-subj", "/CN=throw-away authority"),
            *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        )

    def server(self, *addresses: str) -> Certificate:
        """A certificate for a server at these IP addresses, and at localhost."""
        names = ",".join(["DNS:localhost", *(f"IP:{address}" for address in addresses)])
        return self._issue("/CN=fake API server", f"extendedKeyUsage=serverAuth\nsubjectAltName={names}\n")

    def client(self, name: str) -> Certificate:
        """A certificate for a user of this name."""
        return self._issue(f"/O=system:nodes/CN={name}", "extendedKeyUsage=clientAuth\n")

    def _issue(self, subject: str, extensions: str) -> Certificate:
        self._count += 1
        stem = self.directory / f"issued-{self._count}"
        made = Certificate(stem.with_suffix(".crt"), stem.with_suffix(".key"))
        request, extra = stem.with_suffix(".csr"), stem.with_suffix(".ext")
        extra.write_text(extensions + "keyUsage=critical,digitalSignature\n")
        _openssl("req", "-new", *_KEY, "-keyout", made.key, "-out", request, "-subj", subject)
        _openssl(
            *("x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", self._key, "-CAcreateserial"),
            *("-days", "2", "-extfile", extra, "-out", made.certificate),
        )
        return made


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)
