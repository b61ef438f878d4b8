"""Running a stage: its base class, checkpoints, processes, optimisers, log, errors, pictures.

No file here depends on a particular model.
"""
