"""MLIP's Table 5 at embedded scale: label smoothing and nearest neighbours."""

from benchmarks.mlip_tables import Table

_TABLE = Table(
    "5",
    reference="mlip",
    reading=(
        "The paper gives no coefficients: smoothing 0.1; nearest neighbours with DeCLIP's weight 0.2 in a queue of "
        "16 batches."
    ),
)
run, render = _TABLE.run, _TABLE.render
