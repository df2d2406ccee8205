"""Loaders of recorded traces: the native format and the public ones."""

from servegym.envs.workloads.traces.config import TraceConfig
from servegym.envs.workloads.traces.format import Trace, TraceFormat
from servegym.envs.workloads.traces.loading import load_trace, read_trace
from servegym.envs.workloads.traces.registry import FORMATS

__all__ = ["FORMATS", "Trace", "TraceConfig", "TraceFormat", "load_trace", "read_trace"]
