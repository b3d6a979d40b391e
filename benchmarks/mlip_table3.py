"""MLIP's Table 3 at embedded scale: data of several sizes."""

from benchmarks.mlip_tables import Table

_TABLE = Table(
    "3",
    reference="clip",
    reading=(
        "At embedded scale a run sees as many pictures as the training split has, so that 90 % and 50 % of them "
        "are seen 1.1 and 2 times. The paper does not say which part it keeps; here it is the first shards."
    ),
)
run, render = _TABLE.run, _TABLE.render
