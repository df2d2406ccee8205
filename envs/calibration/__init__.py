"""Calibration: a profile of a live engine from measured steps."""
