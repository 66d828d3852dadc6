"""The quality of an output (`samray quality`): duplicates, suspicious images, repeated masks, drift."""
