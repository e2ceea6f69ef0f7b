"""Scaling: plans of runs before they are paid for."""
