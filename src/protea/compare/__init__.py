"""Several models on the same benchmarks, in one table: ``protea compare``."""
