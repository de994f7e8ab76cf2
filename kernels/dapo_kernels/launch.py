"""A small table by architecture and number of columns says how the kernels are launched. Tuning at run time
would repeat kernels that write over their input.
"""

from __future__ import annotations

from typing import NamedTuple


class Launch(NamedTuple):
    block: int  # elements a program reads at a time
    warps: int


# compute capability → (columns up to, launch of the statistics, launch of loss and gradient); the last line
# serves every larger number
TABLE: dict[int, list[tuple[int, Launch, Launch]]] = {
    80: [(1024, Launch(1024, 4), Launch(1024, 4)), (2**31, Launch(4096, 4), Launch(2048, 4))],
    # the loss spills with (8192, 8)
    90: [(1024, Launch(1024, 4), Launch(1024, 4)), (2**31, Launch(8192, 8), Launch(4096, 4))],
    100: [(1024, Launch(1024, 4), Launch(1024, 4)), (2**31, Launch(8192, 8), Launch(4096, 4))],
}


def launches(capability: int, columns: int) -> tuple[Launch, Launch]:
    """Return the launches of (statistics, loss and gradient) on the newest architecture of the table that is
    not newer than the device.

    `launches(90, 151936)` → (Launch(8192, 8), Launch(4096, 4)); capability 89 is served by 80's lines.
    """
    known = max((arch for arch in TABLE if arch <= capability), default=min(TABLE))
    return next((statistics, loss) for limit, statistics, loss in TABLE[known] if columns <= limit)
