"""Toys that show what a new export format, kind of input or model needs: a file each, and the row that adds it."""
