"""What lies on disk: which images there are, the plan, the Parquet shards, and the check that all of it is sound."""
