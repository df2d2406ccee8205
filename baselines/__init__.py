"""Policy interface and heuristic baselines of the three scheduling layers."""
