"""MLIP's Table 3 at embedded scale: data of several sizes."""

from benchmarks.mlip_tables import Table

_TABLE = Table(
    "3",
    reference="clip",
    reading=(
        "Of fewer pictures each is seen more often: a row's length does not depend on them. The paper does not say "
        "which part it keeps; here it is the first shards."
    ),
)
run, render = _TABLE.run, _TABLE.render
