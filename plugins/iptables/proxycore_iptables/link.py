"""Our end of a worker: starting it, asking it, and ending it when it does not answer."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO, Any

import msgspec

from proxycore.api import Family, KernelError
from proxycore.kernel.xtables import LockHeld
from proxycore.kernel.xtlock import Holder

START_SECONDS = 30.0
"""Importing python-iptables takes most of a second, and several under load."""
_CHUNK_BYTES = 1 << 20


class Link:
    """A worker of one family, started in the network namespace of the thread that makes this, or asks after it has died.

    To be used by that thread alone: the worker ends with it.  Raises KernelError: python-iptables is not installed.
    """

    def __init__(self, family: Family, command: Sequence[str] | None = None) -> None:
        if command is None and importlib.util.find_spec("iptc") is None:
            raise KernelError(
                "the Python package python-iptables is not installed: pip install python-iptables "
                "(it builds a file of C: packages gcc, libc6-dev, python3-dev)"
            )
        self._family = family
        self._command = command or (sys.executable, "-P", "-m", "proxycore_iptables.worker")
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = -1
        self._complaints: IO[bytes] | None = None
        self._buffer = bytearray()
        self._ready = False
        self._start()

    def _start(self) -> None:
        answers, for_worker = os.pipe()
        # In memory: a container may have no place for temporary files.
        complaints = os.fdopen(os.memfd_create("complaints"), "w+b")
        try:
            self._process = subprocess.Popen(
                [*self._command, self._family, str(for_worker), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=complaints,
                pass_fds=(for_worker,),
                start_new_session=True,
            )
        except OSError as error:
            os.close(answers)
            complaints.close()
            raise KernelError(
                f"cannot start the worker for python-iptables: {error.strerror}", errno=error.errno or 0
            ) from error
        finally:
            os.close(for_worker)
        self._answers, self._complaints = answers, complaints
        self._buffer.clear()
        self._ready = False

    @property
    def pid(self) -> int | None:
        """Of the worker; None: there is none now."""
        return self._process.pid if self._process else None

    def ask(self, seconds: float, do: str, **what: Any) -> Any:
        """What the worker answers.

        Raises KernelError with the worker's words; or it has died, or has not answered within `seconds` and was killed: what was
        asked for is then done or not, a table at a time.  The next question starts another one.
        """
        if self._process is None:
            self._start()
        if not self._ready:
            self._receive(START_SECONDS, "begin")
            self._ready = True
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode({"do": do, **what}) + b"\n")
            self._process.stdin.flush()
        except OSError:
            # It has died; the answer that will not come says more.
            pass
        return self._receive(seconds, do)

    def _receive(self, seconds: float, do: str) -> Any:
        end = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        searched = 0
        while (newline := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            left = end - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                self._end()
                raise KernelError(
                    f"the worker for python-iptables did not {do} within {seconds:g} s and was killed"
                )
            chunk = os.read(self._answers, _CHUNK_BYTES)
            if not chunk:
                raise KernelError(f"the worker for python-iptables {self._end()} as it was to {do}")
            self._buffer += chunk
        line = bytes(self._buffer[:newline])
        del self._buffer[: newline + 1]
        answer = msgspec.json.decode(line)
        held = answer.get("held")
        if held:
            raise LockHeld(held[0], tuple(Holder(*holder) for holder in held[1]), held[2])
        if "error" in answer:
            raise KernelError(answer["error"], errno=answer.get("errno", 0))
        return answer.get("value")

    def _end(self) -> str:
        """Kill the worker, if it lives, and say how it ended."""
        process, complaints = self._process, self._complaints
        self._process, self._complaints = None, None
        if process is None or complaints is None:
            return "was ended"
        os.close(self._answers)
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            # One that has closed its answers is about to end by itself.
            process.wait(0.2)
        process.kill()
        status = process.wait()
        with complaints:
            complaints.seek(0)
            lines = complaints.read().decode("utf-8", "replace").strip().splitlines()
        said = f" ({lines[-1].strip()[:200]})" if lines else ""
        return f"ended with {status}{said}"

    def close(self) -> None:
        """End the worker; doing it twice does no harm."""
        self._end()
