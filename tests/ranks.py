"""How a process of a two-process test ends. Import this before the process has a group."""

import gc
from pathlib import Path

import torch.distributed as dist
import torch.distributed.nn  # noqa: F401 (its default arguments keep the group that they find, and so its threads)


def leave_group() -> None:
    """Leave the group together, and let the threads of gloo end.

    A thread of gloo that frees a Python tensor takes the GIL. If Python is shutting down, it ends the thread there,
    which is an error in C++: "terminate called without an active exception", SIGABRT.
    """
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()


def check_threads() -> None:
    """No thread of gloo is left (checked on Linux): nothing holds the group, neither DDP nor a trainer.

    DTensor's caches hold theirs for ever; after a barrier those threads have nothing left to free.
    """
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    assert "pt_gloo_runloop" not in names, names
