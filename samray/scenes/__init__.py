"""Painted scenes whose masks are known: for the demo, for training and for measuring."""
