"""A process that has a network or a disk of its own, as root of a user namespace (Linux)."""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import socket
import struct
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

# linux/sched.h and net/if.h
_NEW_MOUNTS, _NEW_USER, _NEW_NETWORK = 0x00020000, 0x10000000, 0x40000000
_SET_FLAGS, _SET_ADDRESS, _UP = 0x8914, 0x8916, 0x1
FORK = multiprocessing.get_context("fork")


def apart(
    work: Callable[[], object],
    *,
    addresses: Sequence[str] | None = None,
    disk: tuple[Path, str] | None = None,
) -> None:
    """Call `work` in such a process and fail as it does.

    addresses: IPv4 addresses of its network, besides 127.0.0.1; None: the one it has.
    disk: a folder on which a tmpfs of these options is mounted.
    """
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_work, args=(work, addresses, disk, theirs), daemon=True)
    process.start()
    theirs.close()
    said = ours.recv()
    process.join()
    assert said is None, said


def _work(
    work: Callable[[], object],
    addresses: Sequence[str] | None,
    disk: tuple[Path, str] | None,
    pipe: Connection,
) -> None:
    try:
        user, group = os.getuid(), os.getgid()
        _call("unshare", _NEW_USER | _NEW_MOUNTS | (0 if addresses is None else _NEW_NETWORK))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        if disk:
            _call("mount", b"tmpfs", bytes(disk[0]), b"tmpfs", 0, disk[1].encode())
        if addresses is not None:
            _bring_up(addresses)
        work()
        pipe.send(None)
    except BaseException:
        pipe.send(traceback.format_exc())


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def _bring_up(addresses: Sequence[str]) -> None:
    """Of the loopback device, the only one there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SET_FLAGS, struct.pack("16sh22x", b"lo", _UP))
        for number, address in enumerate(addresses):
            name, packed = f"lo:{number}".encode(), socket.inet_aton(address)
            entry = struct.pack("16sHH4s16x", name, socket.AF_INET, 0, packed)
            fcntl.ioctl(control, _SET_ADDRESS, entry)
