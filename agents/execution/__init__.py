"""Where work runs: in processes of this machine, on a Ray cluster, or as Slurm jobs.

A unit of work is plain data; a function of what all units share and of the unit gives a plain result, the same one
each time. So a unit whose worker is lost runs again, and nobody can tell from the results where they were made.
"""

from servegym.agents.execution.config import BackendConfig
from servegym.agents.execution.executor import Executor, open_executor

__all__ = ["BackendConfig", "Executor", "open_executor"]
