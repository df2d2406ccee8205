"""Dispatch of one request to one of several engines."""

from servegym.baselines.engine.blind import Random, RoundRobin
from servegym.baselines.engine.hashed import Chwbl, DualMap
from servegym.baselines.engine.kv_load import Br0, Llumnix
from servegym.baselines.engine.least_requests import LeastRequests, PowerOfTwo
from servegym.baselines.engine.lmetric import LMetric
from servegym.baselines.engine.load_aware import LoadAware
from servegym.baselines.engine.pressure import Gimbal2
from servegym.baselines.engine.programs import Autellix, Preble, SMetric
from servegym.baselines.engine.routers import Dynamo, LlmD, RayPrefix, SgLang
from servegym.baselines.engine.session_sticky import SessionSticky
from servegym.baselines.engine.size_interval import Sita
from servegym.baselines.engine.unfinished_work import JswOracle
from servegym.baselines.engine.vllm import Vllm, Vllm0p9, Vllm2025p11

__all__ = [
    "Autellix",
    "Br0",
    "Chwbl",
    "DualMap",
    "Dynamo",
    "Gimbal2",
    "JswOracle",
    "LMetric",
    "LeastRequests",
    "LlmD",
    "Llumnix",
    "LoadAware",
    "PowerOfTwo",
    "Preble",
    "Random",
    "RayPrefix",
    "RoundRobin",
    "SMetric",
    "SessionSticky",
    "SgLang",
    "Sita",
    "Vllm",
    "Vllm0p9",
    "Vllm2025p11",
]
