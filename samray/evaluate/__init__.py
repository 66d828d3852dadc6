"""How good a model is on images whose regions are known: single clicks, and the masks of the whole image."""
