"""Learning from the decisions of live engines: what was logged in, a bundle and its proof out."""
