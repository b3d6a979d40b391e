"""MLIP's Table 6 at embedded scale: the frequency transform and token alignment."""

from benchmarks.mlip_tables import Table

_TABLE = Table(
    "6",
    reference="clip",
    reading=(
        "FILIP's row is not in the paper's table: plain CLIP with late interaction of all pairs for half of its loss."
    ),
)
run, render = _TABLE.run, _TABLE.render
