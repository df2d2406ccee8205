"""Orders of the waiting queue of one engine."""

from servegym.baselines.request.arrival import Fcfs, Priority
from servegym.baselines.request.chunked import Chunked
from servegym.baselines.request.deadline import Edf, Llf
from servegym.baselines.request.fairness import Vtc
from servegym.baselines.request.levels import Mlfq
from servegym.baselines.request.output import SjfNoisy, SjfOracle, SjfPredicted, SrptOracle, Svf
from servegym.baselines.request.prompt import SjfAge, SpfAging
from servegym.baselines.request.response_ratio import Ewsjf, Hrrn

__all__ = [
    "Chunked",
    "Edf",
    "Ewsjf",
    "Fcfs",
    "Hrrn",
    "Llf",
    "Mlfq",
    "Priority",
    "SjfAge",
    "SjfNoisy",
    "SjfOracle",
    "SjfPredicted",
    "SpfAging",
    "SrptOracle",
    "Svf",
    "Vtc",
]
