"""Training of dispatch policies: a config in, a run folder with a policy bundle out."""
