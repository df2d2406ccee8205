"""Training, evaluation, reports and the command line."""
