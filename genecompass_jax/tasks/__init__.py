"""Downstream tasks, one file each, with their baselines beside the model."""
