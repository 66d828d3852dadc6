"""Toys that show what a new format, kind of input or model needs: one file each."""
