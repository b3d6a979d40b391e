"""Two processes of one group: the test's own and one beside it.

The other ones are forked from a process that has imported the libraries once and computed nothing, since torch's
autograd does not work in a fork of a process that has used it.
"""

import multiprocessing
from datetime import timedelta

from torch import distributed

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["lightning.pytorch", "open_clip"])


def on_two_ranks(work, folder):
    """Run ``work(rank, folder)`` as rank 0 here and as rank 1 in another process. AssertionError: that one failed."""
    other = _FORKS.Process(target=_as_rank, args=(1, work, folder))
    other.start()
    try:
        _as_rank(0, work, folder)
    finally:
        other.join()
    assert other.exitcode == 0


def _as_rank(rank, work, folder):
    store = {"init_method": f"file://{folder}/store", "timeout": timedelta(minutes=5)}
    distributed.init_process_group("gloo", rank=rank, world_size=2, **store)
    try:
        work(rank, folder)
    finally:
        distributed.destroy_process_group()
