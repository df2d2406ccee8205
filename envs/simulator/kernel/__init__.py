"""Compiled kernel of the simulator: memory, blocks, queues, scheduler, router and event loop."""
