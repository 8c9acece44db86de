"""What a process on this machine has used, from Linux's ``/proc``: CPU time and resident memory."""

import os
from pathlib import Path

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


def can_read(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").exists()


def read_cpu_s(pid: int) -> float:
    """Return the CPU seconds of the process, all its threads, user and system; grain 10 ms."""
    # The name in parentheses may hold anything; fields 14 and 15 are counted from behind it.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def read_rss_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_MIB
