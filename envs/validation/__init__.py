"""Validation: the same requests on live engines and in the simulator, and how far apart the two are."""
