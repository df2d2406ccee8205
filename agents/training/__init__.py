"""Training of dispatch policies."""
