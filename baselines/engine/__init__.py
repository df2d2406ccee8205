"""Dispatch of one request to one of several engines."""

from servegym.baselines.engine.blind import Random, RoundRobin
from servegym.baselines.engine.least_requests import LeastRequests, PowerOfTwo
from servegym.baselines.engine.lmetric import LMetric
from servegym.baselines.engine.load_aware import LoadAware
from servegym.baselines.engine.session_sticky import SessionSticky
from servegym.baselines.engine.vllm import Vllm, Vllm0p9, Vllm2025p11

__all__ = [
    "LMetric",
    "LeastRequests",
    "LoadAware",
    "PowerOfTwo",
    "Random",
    "RoundRobin",
    "SessionSticky",
    "Vllm",
    "Vllm0p9",
    "Vllm2025p11",
]
