"""What runs a stage: cards and flags, checkpoints, processes, optimisers, log, errors, pictures; no model is known here."""
