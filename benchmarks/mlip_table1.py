"""MLIP's Table 1: zero-shot accuracy and linear probe on ImageNet."""

from benchmarks.mlip_evaluated import Evaluated

_TABLE = Evaluated("1")
run, render = _TABLE.run, _TABLE.render
