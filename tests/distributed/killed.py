"""A training run that stops for ever while it writes its second checkpoint: with every byte written, before
they are on the disk.

torchrun --nproc-per-node 2 -m tests.distributed.killed RUN_DIR [section.key=value …]; RUN_DIR/writing-<rank>
appears when it is there.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from dapo.__main__ import end, main
from dapo.files import ChunkFile

close = ChunkFile.close


def close_never_the_second_time(self: ChunkFile) -> None:
    global closed
    closed += 1
    if closed == 2:
        (Path(sys.argv[1]) / f"writing-{os.environ['RANK']}").touch()
        time.sleep(600)
    close(self)


closed = 0
if __name__ == "__main__":
    ChunkFile.close = close_never_the_second_time  # type: ignore[method-assign]
    end(main(["train", "examples/arithmetic/config.yaml", f"run.dir={sys.argv[1]}", *sys.argv[2:]]))
