"""A corpus of parquet files in parts, each made once whatever engine gives them out: Ray or Spark."""
