"""Ray itself: clusters, numbers of actors, tasks, signals. Nothing here is about images."""
