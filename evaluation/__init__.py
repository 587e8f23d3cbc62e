"""Metrics, each a torchmetrics.Metric; imports neither lightning, tf_lightning nor callbacks."""
