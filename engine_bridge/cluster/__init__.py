"""Clusters of real vLLM engines: starting them, or finding those that run already."""
