"""The HTML pages of `samray report` for an output and for a training."""
