"""Synthetic scenes with known masks: for the demo, training and evaluation."""
