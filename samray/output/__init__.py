"""The content of OUTPUT: the plan, the Parquet shards, and their readers."""
