"""Lightning glue: when to sample, what to feed which metric, what to log."""
