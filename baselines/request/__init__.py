"""Orders of the waiting queue of one engine."""

from servegym.baselines.request.arrival import Fcfs, Priority
from servegym.baselines.request.output import SjfOracle, SjfPredicted, SrptOracle
from servegym.baselines.request.prompt import SjfAge, SpfAging

__all__ = ["Fcfs", "Priority", "SjfAge", "SjfOracle", "SjfPredicted", "SpfAging", "SrptOracle"]
