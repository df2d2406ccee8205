"""The expert model: where tokens are routed, what it costs, and how experts move."""
