"""MLIP's Table 5 at embedded scale: label smoothing and nearest neighbours."""

from benchmarks.mlip_ablations import ROWS, batch_size
from benchmarks.mlip_tables import Table

_SETTINGS = {**ROWS["smoothing"], **ROWS["neighbours"]}
_TABLE = Table(
    "5",
    reference="mlip",
    reading=(
        f"The paper gives no coefficients: smoothing {_SETTINGS['label_smoothing']}; nearest neighbours with DeCLIP's "
        f"weight {_SETTINGS['neighbour_weight']} in a queue of {_SETTINGS['neighbour_queue'] // batch_size()} batches."
    ),
)
run, render = _TABLE.run, _TABLE.render
