"""A command in a network namespace whose only way out is a cable to a dead end, where every packet is counted.

    unshare --net --mount python netns.py REPORT.json COMMAND…        (as root)

Two namespaces: this process holds the outside end of a veth pair, the command the inside one with the default routes
(IPv4 and IPv6) and a name server behind it. Nothing answers outside, and what the command leaves running ends with it. The
report lists what came through: destination, protocol, port, and the name that was looked up. ARP and multicast of IPv6's own
neighbour discovery are not counted, for they name no host beyond the cable; the addresses of the neighbours are fixed, so
that a packet needs no answer before it is sent.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import cache
from pathlib import Path

OUTSIDE, INSIDE = "forge-out", "forge-in"
ADDRESSES = {4: ("198.51.100.1", "198.51.100.2", 24), 6: ("fd00:f0::1", "fd00:f0::2", 64)}
MACS = {OUTSIDE: "02:00:00:00:00:01", INSIDE: "02:00:00:00:00:02"}
CONTROL = (("198.51.100.1", 443), ("203.0.113.9", 443), ("2001:db8::9", 443))
ETH_IP, ETH_IP6 = 0x0800, 0x86DD
NEIGHBOUR_DISCOVERY = range(133, 138)  # types of ICMPv6


# A command without any route: its first words, to be followed by the command's own
NO_ROUTE = ("unshare", "--net", "sh", "-c", 'ip link set lo up && test -z "$(ip route)" && exec "$@"', "sh")

NOT_PERMITTED = "this user may not make network namespaces (`unshare --net`)"


def counting(report: Path) -> tuple[str, ...]:
    """The first words of a command whose packets are counted into `report`."""
    return ("unshare", "--net", "--mount", sys.executable, __file__, str(report))


def no_route() -> tuple[str, ...]:
    """`NO_ROUTE` where this user may make network namespaces, else nothing."""
    return NO_ROUTE if permitted() else ()


@cache
def permitted() -> bool:
    """Whether this user may make network namespaces."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    probe = f"ip link add {OUTSIDE} type veth peer name {INSIDE} && mount --make-rprivate /"
    done = subprocess.run(["unshare", "--net", "--mount", "sh", "-c", probe], capture_output=True, check=False)
    return done.returncode == 0


def sh(command: str) -> None:
    subprocess.run(command.split(), check=True)


def described(frame: bytes) -> str:
    """`dst proto port` of an IP packet; "" of a frame that is none, or is neighbour discovery."""
    (kind,) = struct.unpack("!H", frame[12:14])
    packet = frame[14:]
    if kind == ETH_IP:
        protocol, dst, rest = packet[9], socket.inet_ntop(socket.AF_INET, packet[16:20]), packet[(packet[0] & 15) * 4 :]
    elif kind == ETH_IP6:
        protocol, dst, rest = packet[6], socket.inet_ntop(socket.AF_INET6, packet[24:40]), packet[40:]
        if packet[24] == 0xFF and protocol in (0, 58):  # multicast reports and solicitations of ICMPv6
            return ""
        if protocol == 58 and packet[40] in NEIGHBOUR_DISCOVERY:  # which also answers the other end of the cable
            return ""
    else:
        return ""
    name = {6: "tcp", 17: "udp", 1: "icmp", 58: "icmp6"}.get(protocol, str(protocol))
    port = struct.unpack("!H", rest[2:4])[0] if protocol in (6, 17) and len(rest) >= 4 else 0
    asked = (
        re.sub(rb"[^\w-]+", b".", rest[20:-4]).decode() if port == 53 and protocol == 17 else ""
    )  # the name that is looked up
    return f"{dst} {name} {port} {asked}".strip()


class Counts(threading.Thread):
    """Reads the outside end from when it is made."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: Counter[str] = Counter()
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
        self.socket.bind((OUTSIDE, 0))

    def run(self) -> None:
        while True:
            try:
                frame, address = self.socket.recvfrom(65535)
            except OSError:  # told once that the other end is gone; what came before is still there to read
                continue
            if address[2] != socket.PACKET_OUTGOING and (what := described(frame)):
                self.seen[what] += 1

    def taken(self) -> dict[str, int]:
        time.sleep(0.3)
        packets, self.seen = self.seen, Counter()
        return dict(packets)


def control() -> None:
    """From inside: a connection to each of CONTROL, and a name that is looked up. None is answered."""
    for host, port in CONTROL:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setblocking(False)
            probe.connect_ex((host, port))
    name_server = Path("/etc/resolv.conf").read_text().split()[1]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.sendto(b"x" * 20, (name_server, 53))


def inner(command: list[str]) -> int:
    """The command, with the inside end up."""
    sys.stdin.readline()  # the cable is in
    sh("ip link set lo up")
    sh(f"ip link set {INSIDE} address {MACS[INSIDE]}")
    Path(f"/proc/sys/net/ipv6/conf/{INSIDE}/accept_ra").write_text("0")
    Path(f"/proc/sys/net/ipv6/conf/{INSIDE}/router_solicitations").write_text("0")
    for version, (_, own, bits) in ADDRESSES.items():
        sh(f"ip -{version} addr add {own}/{bits} dev {INSIDE}{' nodad' if version == 6 else ''}")
    sh(f"ip link set {INSIDE} up")
    for version, (out, _, _) in ADDRESSES.items():
        sh(f"ip -{version} neigh replace {out} lladdr {MACS[OUTSIDE]} dev {INSIDE} nud permanent")
        sh(f"ip -{version} route add default via {out}")
    control()
    print("controlled", flush=True)
    sys.stdin.readline()
    return subprocess.run(command, check=False, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode


def outer(report: str, command: list[str]) -> int:
    resolv = Path(report).with_suffix(".resolv.conf")
    resolv.write_text(f"nameserver {ADDRESSES[4][0]}\noptions timeout:1 attempts:1\n")
    sh("mount --make-rprivate /")
    sh(f"mount --bind {resolv} /etc/resolv.conf")
    sh("ip link set lo up")
    sh(f"ip link add {OUTSIDE} address {MACS[OUTSIDE]} type veth peer name {INSIDE}")
    for version, (own, _, bits) in ADDRESSES.items():
        sh(f"ip -{version} addr add {own}/{bits} dev {OUTSIDE}{' nodad' if version == 6 else ''}")
    sh(f"ip link set {OUTSIDE} up")
    counts = Counts()
    counts.start()
    child = subprocess.Popen(
        ["unshare", "--net", "--pid", "--fork", "--mount-proc", sys.executable, __file__, "--inside", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdin
    assert child.stdout
    while os.readlink(f"/proc/{child.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        time.sleep(0.01)
    try:
        sh(f"ip link set {INSIDE} netns {child.pid}")
        child.stdin.write("\n")
        child.stdin.flush()
        child.stdout.readline()
        seen_of_control = counts.taken()
        child.stdin.write("\n")
        child.stdin.flush()
        code = child.wait()
        seen = counts.taken()
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    Path(report).write_text(json.dumps({"exit": code, "control": seen_of_control, "seen": seen}))
    return code


if __name__ == "__main__":
    if sys.argv[1] == "--inside":
        sys.exit(inner(sys.argv[2:]))
    sys.exit(outer(sys.argv[1], sys.argv[2:]))
