"""Routing recorded from a real model, in a ``.npz`` file.

Arrays of a file (no pickled objects):

==================  ==========================  ================================================================
``expert_ids``      (tokens, layers, top_k)     uint8 or uint16, logical experts; tokens of a sequence in order
``sequence_start``  (sequences + 1,)            first token of each sequence, and the number of tokens; or
``seq``             (tokens,)                   instead: number of the sequence of each token, equal ones adjacent
``task``            (sequences,) or (tokens,)   optional: what a sequence is about, 0 by default
``task_names``      (tasks,)                    optional strings
``weight_q8``       (tokens, layers, top_k)     optional: gate weights on any scale; without, ``expert_ids`` must be in
                                                falling order of weight
``experts``         ()                          optional: experts per layer; default: the highest id and 1
==================  ==========================  ================================================================

Files of the ESFT routing data (deepseek-ai/ESFT, ``results/expert_scores``) packed this way are read as they are.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from servegym.envs.simulator.experts.routing.bank import RoutingBank
from servegym.errors import InputError


def load_routing(path: Path, max_tokens: int | None = None) -> RoutingBank:
    """Read a file.

    Args:
        path: the file.
        max_tokens: keep whole sequences, taken in turn from each task, until they have as many tokens.

    Raises:
        InputError: not readable, an array is missing or wrong.
    """
    source = str(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise InputError(source, "", "no such file") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(source, "", f"not an .npz file of plain arrays: {error}") from None
    if "expert_ids" not in arrays:
        raise InputError(source, "expert_ids", f"missing; the file has {', '.join(sorted(arrays)) or 'nothing'}")
    ids = arrays["expert_ids"]
    if ids.dtype.kind not in "ui" or ids.ndim != 3 or 0 in ids.shape:
        raise InputError(
            source, "expert_ids", f"got {ids.dtype} of shape {ids.shape}; allowed: whole (tokens, layers, top_k)"
        )
    if "weight_q8" in arrays:
        if arrays["weight_q8"].shape != ids.shape:
            raise InputError(
                source, "weight_q8", f"got shape {arrays['weight_q8'].shape}; allowed: {ids.shape}, as expert_ids"
            )
        order = np.argsort(-arrays["weight_q8"].astype(np.int64), axis=2, kind="stable")
        ids = np.take_along_axis(ids, order, axis=2)
    start = _starts(arrays, len(ids), source)
    task = _tasks(arrays, start, len(ids), source)
    names = [str(name) for name in arrays.get("task_names", np.arange(task.max() + 1))]
    experts = int(arrays["experts"]) if "experts" in arrays else int(ids.max()) + 1
    bank = RoutingBank(ids.astype(np.uint16), start, task, tuple(names), experts).check(source)
    return bank if max_tokens is None or bank.tokens <= max_tokens else _thinned(bank, max_tokens)


def _starts(arrays: dict[str, npt.NDArray[np.generic]], tokens: int, source: str) -> npt.NDArray[np.int64]:
    if "sequence_start" in arrays:
        return arrays["sequence_start"].astype(np.int64)
    if "seq" not in arrays:
        raise InputError(source, "sequence_start", "missing; allowed: sequence_start, or seq with an entry per token")
    sequence = arrays["seq"]
    if len(sequence) != tokens:
        raise InputError(source, "seq", f"got {len(sequence)} entries for {tokens} tokens; allowed: one each")
    change = np.flatnonzero(sequence[1:] != sequence[:-1]) + 1
    return np.concatenate([[0], change, [tokens]]).astype(np.int64)


def _tasks(
    arrays: dict[str, npt.NDArray[np.generic]], start: npt.NDArray[np.int64], tokens: int, source: str
) -> npt.NDArray[np.int32]:
    sequences = len(start) - 1
    if "task" not in arrays:
        return np.zeros(sequences, dtype=np.int32)
    task = arrays["task"]
    if len(task) == tokens != sequences:
        task = task[start[:-1]]
    if len(task) != sequences:
        raise InputError(
            source, "task", f"got {len(task)} entries; allowed: one per sequence ({sequences}) or token ({tokens})"
        )
    return task.astype(np.int32)


def _thinned(bank: RoutingBank, max_tokens: int) -> RoutingBank:
    """Whole sequences, in turn from each task."""
    lengths = np.diff(bank.sequence_start)
    turns = [np.flatnonzero(bank.task == task) for task in range(len(bank.task_names))]
    order = [int(turn[i]) for i in range(max(map(len, turns))) for turn in turns if i < len(turn)]
    kept, total = [], 0
    for place, sequence in enumerate(order):
        if place >= len(turns) and total + lengths[sequence] > max_tokens:
            continue
        kept.append(sequence)
        total += int(lengths[sequence])
    rows = np.concatenate([np.arange(bank.sequence_start[i], bank.sequence_start[i + 1]) for i in kept])
    start = np.concatenate([[0], np.cumsum(lengths[kept])]).astype(np.int64)
    return RoutingBank(bank.expert_ids[rows], start, bank.task[kept], bank.task_names, bank.experts)


def relabelled(bank: RoutingBank, seed: int) -> RoutingBank:
    """Return the bank with the experts of each layer renamed at random: another model of the same statistics."""
    rng = np.random.default_rng((seed, 0x9E7))
    names = np.stack([rng.permutation(bank.experts) for _ in range(bank.layers)]).astype(np.uint16)
    ids = names[np.arange(bank.layers)[None, :, None], bank.expert_ids]
    return RoutingBank(ids, bank.sequence_start, bank.task, bank.task_names, bank.experts)
