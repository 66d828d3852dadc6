"""What holds for every model family, each with a micro variant: generators, edges, training, label maps."""
