"""What runs a stage: its base class, checkpoints, processes, optimisers, log, errors, pictures.

No file here knows a model.
"""
