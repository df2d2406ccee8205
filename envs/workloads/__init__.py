"""Workloads: generated and recorded requests."""

from servegym.envs.workloads.generation import generate, mean_lengths
from servegym.envs.workloads.table import RequestTable
from servegym.envs.workloads.traces import TraceConfig, load_trace
from servegym.envs.workloads.workload import WorkloadConfig, load_workload

__all__ = ["RequestTable", "TraceConfig", "WorkloadConfig", "generate", "load_trace", "load_workload", "mean_lengths"]
