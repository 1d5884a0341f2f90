"""A world of one process, for frameworks that want to be distributed."""

from __future__ import annotations

import os
import socket


def pretend_one_rank() -> None:
    """Set what a launcher would set for one process; the port is a free one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(port))
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
