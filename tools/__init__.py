"""Commands beside training: tables, estimates, claims, benchmarks, features and predictions."""
