"""Simulator, workloads, profiles and Gymnasium environments."""
