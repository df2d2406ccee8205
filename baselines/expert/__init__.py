"""Placements of experts on expert-parallel ranks."""

from servegym.baselines.expert.affinity import Edr, ExFlow, Grace, MoETuner, SourceAware
from servegym.baselines.expert.balance import FlashLb, Metro
from servegym.baselines.expert.collocate import Collocate
from servegym.baselines.expert.eplb import Eplb, Oracle
from servegym.baselines.expert.static import Linear, Random, RoundRobin
from servegym.baselines.expert.trigger import MindSpeed, Periodic, Prism

__all__ = [
    "Collocate",
    "Edr",
    "Eplb",
    "ExFlow",
    "FlashLb",
    "Grace",
    "Linear",
    "Metro",
    "MindSpeed",
    "MoETuner",
    "Oracle",
    "Periodic",
    "Prism",
    "Random",
    "RoundRobin",
    "SourceAware",
]
