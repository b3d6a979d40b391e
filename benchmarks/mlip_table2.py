"""MLIP's Table 2: zero-shot accuracy and linear probe on ten data sets."""

from benchmarks.mlip_evaluated import Evaluated

_TABLE = Evaluated("2")
run, render = _TABLE.run, _TABLE.render
