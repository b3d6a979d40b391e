"""MLIP's Table 7 at embedded scale: matchings of frequency and spatial tokens."""

from benchmarks.mlip_tables import Table

_TABLE = Table(
    "7",
    reference="mlip",
    reading="Methods name the matching of frequency tokens, then that of spatial tokens.",
)
run, render = _TABLE.run, _TABLE.render
