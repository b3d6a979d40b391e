"""The papers' tables and figures, each beside ours; run as `python -m benchmarks NAME`."""
