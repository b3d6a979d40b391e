"""All results as one HTML file, which opens without a network, a framework or another file.

It is built from `benchmarks/results`: the JSON, Markdown and figures of each benchmark.
"""

from benchmarks.report.page.build import build

__all__ = ["build"]
