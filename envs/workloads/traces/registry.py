"""The known trace formats, and telling them apart."""

from __future__ import annotations

from servegym.envs.workloads.traces.azure import AZURE
from servegym.envs.workloads.traces.bailian import BAILIAN
from servegym.envs.workloads.traces.burstgpt import BURSTGPT
from servegym.envs.workloads.traces.decisions import DECISIONS
from servegym.envs.workloads.traces.files import TraceFile
from servegym.envs.workloads.traces.format import TraceFormat
from servegym.envs.workloads.traces.mooncake import MOONCAKE
from servegym.envs.workloads.traces.native import NATIVE
from servegym.envs.workloads.traces.servegen import SERVEGEN
from servegym.envs.workloads.traces.tracelab import TRACELAB

# The columns of the native format are among those of a decision log, those of Mooncake among those of Bailian.
FORMATS = {known.name: known for known in (DECISIONS, NATIVE, AZURE, BURSTGPT, BAILIAN, MOONCAKE, SERVEGEN, TRACELAB)}


def detect(file: TraceFile) -> TraceFormat:
    """Recognise the format of a file by its columns.

    Raises:
        InputError: no format fits; names the first column that the likeliest one lacks.
    """
    known = [(columns, entry) for entry in FORMATS.values() for columns in entry.columns]
    for columns, entry in known:
        if all(name in file.columns for name in columns):
            return entry
    # The likeliest one; the native format where nothing fits.
    columns, _ = max(
        known, key=lambda item: (sum(name in file.columns for name in item[0]) / len(item[0]), item[1] is NATIVE)
    )
    raise file.missing(next(name for name in columns if name not in file.columns), columns)
