"""Training of the embedded model on synthetic scenes, and the figure that says how good it is."""
