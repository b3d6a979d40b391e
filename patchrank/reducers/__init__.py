"""Token reducers, one idea a file, on the list of ``common.reducer_registry``; docs/reducers.md describes each."""

from patchrank.reducers.atc import ATC
from patchrank.reducers.ats import ATS
from patchrank.reducers.class_attention import ClassAttention, HiRED
from patchrank.reducers.controls import CentreCrop, HalfResolution
from patchrank.reducers.crossget import CrossGET
from patchrank.reducers.diffrate import DiffRate
from patchrank.reducers.divprune import DivPrune
from patchrank.reducers.dpc_knn import DPCKNN
from patchrank.reducers.dynamicvit import DynamicViT
from patchrank.reducers.evit import EViT
from patchrank.reducers.given import GoldenOracle
from patchrank.reducers.gtp import GTP
from patchrank.reducers.kmedoids import KMedoids
from patchrank.reducers.mctf import MCTF
from patchrank.reducers.patch_ranking import PatchRanking
from patchrank.reducers.pitome import PiToMe
from patchrank.reducers.prumerge import PruMerge, PruMergePlus
from patchrank.reducers.random import RandomKeep, RandomPerBatch, RandomPerPicture
from patchrank.reducers.recoverable import RecoverableCompression
from patchrank.reducers.tca import TokenCondensation
from patchrank.reducers.tiles import GlobalCom2
from patchrank.reducers.token_correlation import TokenCorrelation
from patchrank.reducers.tome import ToFu, ToMe
from patchrank.reducers.vflowopt import VFlowOpt
from patchrank.reducers.visionzip import VisionZip
from patchrank.reducers.zoo_prune import ZOOPrune

__all__ = [
    "ATC",
    "ATS",
    "DPCKNN",
    "GTP",
    "MCTF",
    "CentreCrop",
    "ClassAttention",
    "CrossGET",
    "DiffRate",
    "DivPrune",
    "DynamicViT",
    "EViT",
    "GlobalCom2",
    "GoldenOracle",
    "HalfResolution",
    "HiRED",
    "KMedoids",
    "PatchRanking",
    "PiToMe",
    "PruMerge",
    "PruMergePlus",
    "RandomKeep",
    "RandomPerBatch",
    "RandomPerPicture",
    "RecoverableCompression",
    "ToFu",
    "ToMe",
    "TokenCondensation",
    "TokenCorrelation",
    "VFlowOpt",
    "VisionZip",
    "ZOOPrune",
]
