"""The HTML pages of `samray report`, about an output and about a training."""
