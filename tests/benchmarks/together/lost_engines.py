"""Engines that fail in their process, each at another time, as ``Engine.graphs``."""

import os
import signal

import torch


def refuses(prepared):
    """It cannot open its graphs, and says with how many threads."""
    raise RuntimeError(f"no such graph for {torch.get_num_threads()} threads")


def ends_at_batch_1(prepared):
    """It answers whole batches, and its process ends at the first single picture, so while it is timed."""
    return [_unless_single for _ in prepared.stages]


def _unless_single(*tensors):
    if len(tensors[0]) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.eye(len(tensors[0]), 32), *tensors
