"""Commands other than training: tables, estimates, claims, benchmarks, features, predictions."""
