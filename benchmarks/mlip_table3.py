"""MLIP's Table 3 at embedded scale: data of several sizes."""

from benchmarks.mlip_tables import Table

_TABLE = Table(
    "3",
    reference="clip",
    reading=(
        "A row's steps show 25,600 pictures: none twice where all 60,000 are read, each about twice of 20 % and eight "
        "to nine times of 5 %. The common start has seen all of them, so a row that reads fewer has lost less here "
        "than one trained on those alone. The paper does not say which part it keeps; here it is the first shards."
    ),
)
run, render = _TABLE.run, _TABLE.render
