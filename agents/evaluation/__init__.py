"""Evaluation: policies x workloads x loads x seeds on shared requests, with paired statistics."""

from servegym.agents.evaluation.config import EvaluationConfig
from servegym.agents.evaluation.report import Evaluation
from servegym.agents.evaluation.run import evaluate

__all__ = ["Evaluation", "EvaluationConfig", "evaluate"]
