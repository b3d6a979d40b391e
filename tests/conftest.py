"""The garbage collector leaves alone what importing made: it would look through half a million objects in vain."""

import gc

gc.disable()


def pytest_collection_finish():
    """All modules are imported now, and stay."""
    gc.collect()
    gc.freeze()
    gc.enable()
