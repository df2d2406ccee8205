"""Simulated cluster: SimPy for the cluster, a compiled kernel for the engines. Imports neither Gymnasium nor torch."""
