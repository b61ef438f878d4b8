"""What runs a stage: flags, checkpoints, processes, optimisers, log, errors, pictures.

No model is known here.
"""
