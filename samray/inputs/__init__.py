"""The images of an INPUT: list them, fetch their bytes, decode them to RGB."""
