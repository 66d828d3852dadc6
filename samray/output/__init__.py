"""What is stored in OUTPUT: the plan, the Parquet shards, and all that reads them."""
