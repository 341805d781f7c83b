"""How much memory this process can have, by the system's own word: the machine's, and what the control
group that it is in (a container's, a service's) leaves of its limit."""

import os
import platform
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def free_bytes(root: Path = ROOT) -> int:
    """Memory that can be had without swapping; where the system does not say, half of all."""
    found = _of_machine(root, "MemAvailable")
    if found is None:
        found = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return min([found, *_of_groups(root)])


def most_bytes(root: Path = ROOT) -> int | None:
    """What can be had at all, swap included; None where the system does not say."""
    swap = _of_machine(root, "SwapFree")
    return None if swap is None else free_bytes(root) + swap


def _of_machine(root: Path, key: str) -> int | None:
    if platform.system() != "Linux":
        return None
    with (root / "proc/meminfo").open() as lines:
        for line in lines:
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None


def _of_groups(root: Path) -> Iterator[int]:
    """What each control group above this process has left; nothing where none has a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names, folder = ("memory.max", "memory.current", ""), "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            folder = "sys/fs/cgroup/memory"
        else:
            continue
        # inside a container the path may be the host's: its own group is the root then
        group = PurePosixPath(path.strip("/"))
        for one in (group, *group.parents):
            left = _left_of(root / folder / one, *names)
            if left is not None:
                yield left


def _left_of(folder: Path, limit: str, usage: str, prefix: str) -> int | None:
    try:
        allowed = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if allowed == "max":
        return None
    # pages of files are given up before anybody is refused
    files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    return max(0, int(allowed) - used + files)
