"""Delay each packet from the client to the server by a fixed time; a separate process in the client's
namespace.

    python -m benchmarks.network.delay_line SERVER_NAMESPACE SECONDS

It makes a tun device `delayed` in either namespace, prints "ready", and passes on until it is ended; the lab routes to
it. Only requests and acknowledgements come this way, some thousands a second, which Python can carry.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

DEVICE = b"delayed"
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MAX_PACKET_BYTES = 1 << 16


def open_tun() -> int:
    """Open a new tun device in the current namespace."""
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", DEVICE, IFF_TUN | IFF_NO_PI))
    return tun


def enter(namespace: str) -> None:
    """Move this thread into a network namespace (os.setns comes with Python 3.12)."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if libc.setns(descriptor, 0):
        raise OSError(ctypes.get_errno(), f"setns({namespace})")
    os.close(descriptor)


def carry(source: int, sink: int, delay: float) -> None:
    """Forward packets from one tun device to the other, without end."""
    held: deque[tuple[float, bytes]] = deque()
    while True:
        wait = max(0.0, held[0][0] - time.monotonic()) if held else None
        readable, _, _ = select.select([source], [], [], wait)
        if readable:
            held.append((time.monotonic() + delay, os.read(source, MAX_PACKET_BYTES)))
        while held and held[0][0] <= time.monotonic():
            os.write(sink, held.popleft()[1])


def main(namespace: str, delay: float) -> None:
    """Run until the process is ended."""
    source = open_tun()
    enter(namespace)
    sink = open_tun()
    print("ready", flush=True)
    carry(source, sink, delay)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
