"""Search for the parameters of heuristics and of training, the same number of trials for each."""
