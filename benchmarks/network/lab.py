"""Two hosts in network namespaces and the link between them, with any rate, loss and delay, and rates that change.

    server [nginx] -- htb: rate -- bpf: loss -->  veth  --> [client]
           <-- veth, or where there is a delay a line of tun devices (delay_line.py) --

The whole delay is on the way to the server: a request and its answer take the same time wherever it is, and
there the packets are few, so that a line in user space can hold them; `tc`'s netem would do it too, but many kernels
of virtual machines lack it. Loss is a class of the shaper that holds nothing, into which a classic BPF program of
four instructions throws packets at random. The rate counts whole frames: of a TCP stream in frames of 1,500 bytes 95 %
are content.

All needs root and the programs ip, tc and nginx; `why_not` says what is lacking. Whatever happens, the namespaces and
processes end with the `Lab`; those of a lab that was killed are removed by the next one.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from eval.traces import Trace

PROGRAMS = ("ip", "tc", "nginx")
PREFIX = "cachegen-lab"
SERVER_ADDRESS, CLIENT_ADDRESS, PORT = "10.203.7.1", "10.203.7.2", 8080
URL = f"http://{SERVER_ADDRESS}:{PORT}"
MTU = 1500
BURST_SECONDS, MIN_BURST_BYTES = 0.001, 16 << 10
"""Bytes that the shaper may send at once: enough that its timer does not limit the rate."""
QUEUE_BYTES = 4 << 20
ROOT = Path(__file__).resolve().parent.parent.parent
NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log stderr crit; user root;
events {{ worker_connections 256; }}
http {{
    access_log {log}; root {root}; sendfile on; tcp_nopush on; keepalive_requests 100000;
    client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
    uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
    server {{ listen {address}:{port} reuseport; }}
}}
"""
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/local/sbin"


class LabError(RuntimeError):
    """The lab cannot be built or controlled here; the message gives the reason."""


def why_not() -> str | None:
    """Return the reason why no lab can be built here, None where one can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's alone"
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt-get install iproute2 nginx-light)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"{PREFIX}-{os.getpid()}-try"
    try:
        run("ip", "netns", "add", name)
        try:
            run("tc", "-n", name, "qdisc", "add", "dev", "lo", "root", "handle", "1:", "htb")
        finally:
            run("ip", "netns", "del", name)
    except LabError as error:
        return str(error)
    return None


def run(*command: str) -> str:
    """Run a command and return its output. Raises LabError with its error output where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": _PATH})
    if done.returncode:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


class Lab:
    """The two hosts, as a context manager. folder: what nginx serves at URL.

    delay: seconds of a round trip (besides those that packets take to be sent); loss: share of the packets with content
    that get lost; congestion: the server's algorithm (cubic, bbr, ...), None: the kernel's default. log: nginx's access
    log, for counting requests.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rate: float = 1e9,
        delay: float = 0.0,
        loss: float = 0.0,
        congestion: str | None = None,
        log: Path | None = None,
    ) -> None:
        self.folder, self.delay, self.loss, self.log = folder, delay, loss, log
        self.congestion = congestion
        self._first_rate = rate
        self.server, self.client = (f"{PREFIX}-{os.getpid()}-{side}" for side in ("server", "client"))
        self._stack = ExitStack()
        self._tc: subprocess.Popen[str] | None = None

    def __enter__(self) -> Lab:
        if (reason := why_not()) is not None:
            raise LabError(reason)
        _remove_dead()
        # A signal ends the lab through __exit__, as Ctrl-C does.
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            self._stack.callback(signal.signal, signal.SIGTERM, before)
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _build(self) -> None:
        for name in (self.server, self.client):
            run("ip", "netns", "add", name)
            self._stack.callback(run, "ip", "netns", "del", name)
        run(
            "ip",
            "link",
            "add",
            "veth",
            "netns",
            self.server,
            "type",
            "veth",
            "peer",
            "name",
            "veth",
            "netns",
            self.client,
        )
        for name, address in ((self.server, SERVER_ADDRESS), (self.client, CLIENT_ADDRESS)):
            run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "veth")
            run("ip", "-n", name, "link", "set", "veth", "mtu", str(MTU), "up")
            self._set(name, "net.ipv4.conf.all.rp_filter", 0)  # the way back is another one
            self._set(name, "net.ipv4.conf.veth.rp_filter", 0)
            self._set(name, "net.ipv4.tcp_no_metrics_save", 1)  # a run must not profit from the one before
        if self.congestion is not None:
            # By the route, since a namespace may not choose every algorithm for all of its sockets.
            way = ("dev", "veth", "src", SERVER_ADDRESS, "congctl", self.congestion)
            run("ip", "-n", self.server, "route", "replace", f"{CLIENT_ADDRESS}/32", *way)
        if self.loss:
            # Else one lost packet would be up to 44 of them.
            run("ip", "-n", self.server, "link", "set", "veth", "gso_max_segs", "1")
        self._shape()
        self._start_nginx()
        if self.delay:
            self._start_delay_line()
        self._await(PORT)

    def _set(self, name: str, key: str, value: object) -> None:
        path = "/proc/sys/" + key.replace(".", "/")
        run("ip", "netns", "exec", name, "sh", "-c", f"echo {value} > {path}")

    def _shape(self) -> None:
        tc = ("tc", "-n", self.server)
        device = ("dev", "veth")
        run(*tc, "qdisc", "add", *device, "root", "handle", "1:", "htb", "default", "1")
        run(*tc, "class", "add", *device, "parent", "1:", "classid", "1:1", *_htb(self._first_rate))
        run(*tc, "qdisc", "add", *device, "parent", "1:1", "handle", "11:", "bfifo", "limit", str(QUEUE_BYTES))
        if self.loss:
            run(*tc, "class", "add", *device, "parent", "1:", "classid", "1:2", *_htb(8e6))
            run(*tc, "qdisc", "add", *device, "parent", "1:2", "handle", "12:", "pfifo", "limit", "0")
            run(*tc, "filter", "add", *device, "parent", "1:", "protocol", "ip", "prio", "1", "bpf", "bytecode",
                _drops(self.loss), "flowid", "1:2")  # fmt: skip
        # One process for all changes of the rate: starting one each time takes milliseconds.
        self._tc = self.start(self.server, ["tc", "-batch", "-"], stdin=subprocess.PIPE)

    def set_rate(self, rate: float) -> None:
        """Set the rate of the link in bits per second; whole frames count."""
        if self._tc is None or self._tc.stdin is None or self._tc.poll() is not None:
            raise LabError("the lab is not running")
        self._tc.stdin.write(f"class change dev veth parent 1: classid 1:1 {' '.join(_htb(rate))}\n")
        self._tc.stdin.flush()

    def replay(self, trace: Trace, seconds: float = 600.0) -> Replay:
        """Start to replay a trace; the context manager ends it."""
        return Replay(self, trace, seconds)

    def _start_nginx(self) -> None:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="cachegen-nginx-")))
        configuration = folder / "nginx.conf"
        log = "off" if self.log is None else str(self.log)
        configuration.write_text(
            NGINX.format(folder=folder, root=self.folder, address=SERVER_ADDRESS, port=PORT, log=log)
        )
        self.start(self.server, ["nginx", "-p", str(folder), "-c", str(configuration), "-e", "stderr"])

    def _start_delay_line(self) -> None:
        ready = self.start(
            self.client,
            [sys.executable, "-m", "benchmarks.network.delay_line", self.server, str(self.delay)],
            stdout=subprocess.PIPE,
        )
        if ready.stdout is None or ready.stdout.readline().strip() != "ready":
            raise LabError("the delay line does not start (is there a /dev/net/tun?)")
        run("ip", "-n", self.server, "link", "set", "delayed", "up")
        run("ip", "-n", self.client, "link", "set", "delayed", "up")
        run("ip", "-n", self.client, "route", "add", f"{SERVER_ADDRESS}/32", "dev", "delayed", "src", CLIENT_ADDRESS)

    def start(
        self, name: str, command: Sequence[str], *, environment: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start a process in one of the namespaces, in the checkout's folder; it ends with the lab."""
        variables = {**os.environ, "PATH": _PATH, **(environment or {})}
        process: subprocess.Popen[str] = subprocess.Popen(
            ["ip", "netns", "exec", name, *command], cwd=ROOT, text=True, env=variables, **options
        )
        self._stack.callback(_end, process)
        return process

    def _await(self, port: int) -> None:
        """Wait until the server answers the client."""
        probe = f"""if True:
            import socket, time
            for _ in range(100):
                with socket.socket() as probe:
                    probe.settimeout(1)
                    if not probe.connect_ex(("{SERVER_ADDRESS}", {port})):
                        raise SystemExit(0)
                time.sleep(0.05)
            raise SystemExit("nginx does not answer the client")"""
        run("ip", "netns", "exec", self.client, sys.executable, "-c", probe)


class Replay:
    """Changes a lab's rate according to a trace, from __enter__ on, in a separate thread."""

    def __init__(self, lab: Lab, trace: Trace, seconds: float) -> None:
        self._lab, self._trace, self._seconds = lab, trace, seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="replay", daemon=True)

    def __enter__(self) -> Replay:
        self._lab.set_rate(self._trace.rates[0])
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        start = time.monotonic()
        for at, rate in self._trace.steps(self._seconds):
            if self._ended.wait(max(0.0, start + at - time.monotonic())):
                return
            self._lab.set_rate(rate)


def _htb(rate: float) -> list[str]:
    # The shaper knows no rate of zero: 8 bits a second let nothing pass that anybody would wait for.
    rate = max(rate, 8.0)
    burst = str(max(MIN_BURST_BYTES, round(rate / 8 * BURST_SECONDS)))
    quantum = str(60_000)
    return ["htb", "rate", f"{round(rate)}bit", "ceil", f"{round(rate)}bit", "burst", burst, "cburst", burst,
            "quantum", quantum]  # fmt: skip


def _drops(share: float) -> str:
    """Return classic BPF for tc that matches a share of the packets."""
    load_random = (0x20, 0, 0, 0xFFFFF000 + 56)  # SKF_AD_OFF + SKF_AD_RANDOM
    if_above = (0x35, 1, 0, min(round(share * 2**32), 2**32 - 1))
    matches, passes = (0x06, 0, 0, 0xFFFFFFFF), (0x06, 0, 0, 0)
    program = [load_random, if_above, matches, passes]
    return ",".join([str(len(program)), *(" ".join(map(str, line)) for line in program)])


def _end(process: subprocess.Popen[str]) -> None:
    if process.stdin is not None:
        with suppress(OSError):  # where it has ended already
            process.stdin.close()
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _remove_dead() -> None:
    """Remove the namespaces of labs whose process was killed."""
    for line in run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        parts = name.removeprefix(f"{PREFIX}-").split("-")
        if name.startswith(f"{PREFIX}-") and parts[0].isdigit() and not Path(f"/proc/{parts[0]}").exists():
            run("ip", "netns", "del", name)


def default_congestion() -> str:
    """Return the kernel's congestion control for new sockets."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        return probe.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()
