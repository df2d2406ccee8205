"""Trains the network of ``torch_network.py``: random dispatch in the simulator shows what TTFT follows on what."""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_model

from servegym.baselines.interface import EngineViews, FloatArray, RequestView
from servegym.baselines.registry import create
from servegym.configs.examples.torch_network import WEIGHTS, PredictedTtft, features
from servegym.envs.requests import RequestSource, WorkloadChoice
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig


class Recorder:
    """Dispatches at random, and notes what it saw of the chosen engine and the logarithm of the TTFT that came."""

    def __init__(self) -> None:
        self.rows: list[tuple[FloatArray, float]] = []
        self._waiting: dict[int, tuple[float, FloatArray]] = {}

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return 0 for a random engine and 1 for the others."""
        self._seen = features(request, engines)
        scores: FloatArray = np.ones(len(engines))
        scores[int(request.uniforms[0] * len(engines))] = 0.0
        return scores

    def on_dispatch(self, request: RequestView, engine: int) -> None:
        """Keep what was seen until the first token tells how it was."""
        self._waiting[request.index] = (request.arrival_s, self._seen[engine])

    def on_first_token(self, request_index: int, engine: int, now_s: float) -> None:
        """Note an example."""
        arrival_s, seen = self._waiting.pop(request_index)
        self.rows.append((seen, np.log(now_s - arrival_s)))


def examples(requests: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features, shape (n, 4), and the logarithms of TTFT, shape (n, 1), at three loads of four engines."""
    cluster = ClusterConfig.model_validate({"engines": 4, "profile": "qwen3-30b-a3b-h200"})
    recorder = Recorder()
    for seed, load in enumerate((0.5, 0.7, 0.9), start=2000):
        table = RequestSource(WorkloadChoice(name="azure-conv", requests=requests), cluster).table(seed, load=load)
        policies = (create("request", "fcfs"), recorder, create("expert", "linear"))
        SimulatedCluster(cluster, table, *policies, seed=seed).run()
    seen, ttft = zip(*recorder.rows, strict=True)
    return torch.from_numpy(np.array(seen)), torch.tensor(ttft).float().unsqueeze(-1)


def train(weights: Path, requests: int = 10_000, steps: int = 1500) -> list[float]:
    """Fit the network, write its weights, and return the mean squared errors."""
    torch.manual_seed(0)
    inputs, wanted = examples(requests)
    network = PredictedTtft(weights="")
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.mse_loss(network(inputs), wanted)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    save_model(network, str(weights))
    return losses


if __name__ == "__main__":
    errors = train(Path(sys.argv[1]) if len(sys.argv) > 1 else WEIGHTS)
    print(f"mean squared error of ln TTFT: {errors[0]:.3f}, after {len(errors)} steps {errors[-1]:.3f}")
