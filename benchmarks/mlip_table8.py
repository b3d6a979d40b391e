"""MLIP's Table 8 at embedded scale: with and without the Guide."""

from benchmarks.mlip_tables import Table

_TABLE = Table(
    "8",
    reference="mlip",
    reading=(
        "The paper prints one triple for CLIP, SLIP, DeCLIP and MLIP without Guide; CLIP's is 10.4, 6.6, 16.3 in "
        "its Table 6, so only the last two rows can be trusted."
    ),
)
run, render = _TABLE.run, _TABLE.render
