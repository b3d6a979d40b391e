"""How ONNX Runtime's sessions share the cores; it imports no torch."""

from __future__ import annotations

import onnxruntime


def session_options(threads: int | None) -> onnxruntime.SessionOptions:
    """Options of one of several sessions that run in turn. threads: None: ONNX Runtime's own choice.

    A session's threads look for work in a loop, which is fast between the operators of a call. After a call they would
    take the cores from the session of the next level: on two cores early exit took twice the time.
    """
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options
