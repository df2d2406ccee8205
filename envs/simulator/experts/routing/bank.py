"""A bank of token sequences with their routed experts: the form that every source of routing takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from servegym.errors import InputError


@dataclass(frozen=True, slots=True, eq=False)
class RoutingBank:
    """Which experts each token of some sequences chose, recorded or generated.

    Attributes:
        expert_ids: shape (tokens, layers, top_k), uint16; distinct within a token and layer, in falling order of gate
            weight.
        sequence_start: first token of each sequence and the number of tokens, shape (sequences + 1,), int64.
        task: what each sequence is about, an index into ``task_names``, shape (sequences,), int32.
        task_names: names of the tasks; each has at least one sequence.
        experts: logical experts per layer.
    """

    expert_ids: npt.NDArray[np.uint16]
    sequence_start: npt.NDArray[np.int64]
    task: npt.NDArray[np.int32]
    task_names: tuple[str, ...]
    experts: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.expert_ids.shape[0])

    @property
    def layers(self) -> int:
        """Number of MoE layers."""
        return int(self.expert_ids.shape[1])

    @property
    def top_k(self) -> int:
        """Experts that a token chooses in a layer."""
        return int(self.expert_ids.shape[2])

    def token_task(self) -> npt.NDArray[np.int32]:
        """Return the task of each token, shape (tokens,)."""
        return np.repeat(self.task, np.diff(self.sequence_start))

    def popularity(self) -> npt.NDArray[np.float64]:
        """Return how often a token of each task chooses each expert, shape (tasks, layers, experts).

        Sums to ``top_k`` over the experts.
        """
        tasks = len(self.task_names)
        task = self.token_task()
        counts = np.empty((tasks, self.layers, self.experts))
        for layer in range(self.layers):
            cell = task[:, None].astype(np.int64) * self.experts + self.expert_ids[:, layer]
            counts[:, layer] = np.bincount(cell.ravel(), minlength=tasks * self.experts).reshape(tasks, self.experts)
        return np.asarray(counts / np.bincount(task, minlength=tasks)[:, None, None])

    def check(self, source: str) -> RoutingBank:
        """Return the bank if it is well formed.

        Args:
            source: where it comes from, for messages.

        Raises:
            InputError: names the array and what is wrong with it.
        """
        ids, start, task = self.expert_ids, self.sequence_start, self.task
        if ids.ndim != 3 or 0 in ids.shape:
            raise InputError(source, "expert_ids", f"got shape {ids.shape}; allowed: (tokens, layers, top_k), none 0")
        if self.top_k > self.experts:
            raise InputError(
                source, "expert_ids", f"top_k {self.top_k} of {self.experts} experts; allowed: at most all"
            )
        if int(ids.max()) >= self.experts:
            raise InputError(source, "expert_ids", f"got expert {ids.max()}; allowed: 0 to {self.experts - 1}")
        ordered = np.sort(ids, axis=2)
        repeated = (ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=2)
        if repeated.any():
            token, layer = np.argwhere(repeated)[0]
            raise InputError(source, "expert_ids", f"token {token} chooses an expert of layer {layer} twice")
        if start[0] != 0 or start[-1] != self.tokens or (np.diff(start) <= 0).any():
            raise InputError(source, "sequence_start", f"allowed: increasing, from 0 to {self.tokens} tokens")
        if len(task) != len(start) - 1:
            raise InputError(source, "task", f"got {len(task)} for {len(start) - 1} sequences; allowed: one each")
        missing = sorted(set(range(len(self.task_names))) - set(task.tolist()))
        if missing or (task >= len(self.task_names)).any() or (task < 0).any():
            raise InputError(
                source, "task", f"allowed: 0 to {len(self.task_names) - 1}, each at least once; missing: {missing}"
            )
        return self
