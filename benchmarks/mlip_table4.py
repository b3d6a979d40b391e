"""MLIP's Table 4: retrieval on Flickr30k and MS-COCO."""

from benchmarks.mlip_evaluated import Evaluated

_TABLE = Evaluated("4")
run, render = _TABLE.run, _TABLE.render
