"""Ray as such: which cluster, how many actors, tasks, signals. Nothing here knows of images."""
