"""Masks with names (`labels.by`): one file per way, one row per way in `samray.config.labels`."""
