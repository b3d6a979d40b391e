"""MLIP's Table 6 at embedded scale: the frequency transform and token alignment."""

from benchmarks.mlip_tables import Table

_TABLE = Table(
    "6",
    reference="clip",
    reading=(
        "Two rows are not in the paper's table. The power spectrum of equation 10 forgets where the tokens were, so "
        "the frequency transform was also tried on the spectrum itself. FILIP: plain CLIP with late interaction of all "
        "pairs for half of its loss."
    ),
)
run, render = _TABLE.run, _TABLE.render
