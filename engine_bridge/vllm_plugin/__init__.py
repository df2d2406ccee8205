"""What runs inside a vLLM engine: numpy, our policies and vLLM itself; no torch of our own, no training code."""
