"""All results as one HTML file that needs nothing else: no network, no framework, no other file.

It is made from what `benchmarks/results` holds, a result's JSON, Markdown and figures.
"""

from benchmarks.report.page.build import build

__all__ = ["build"]
