"""servegym: a reinforcement-learning scheduling research platform for serving Mixture-of-Experts models with vLLM."""

from __future__ import annotations

__version__ = "0.1.0"
