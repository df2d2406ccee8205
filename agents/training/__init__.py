"""Training of policies: a config in, a run folder with a policy bundle out."""
