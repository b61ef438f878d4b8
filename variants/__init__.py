"""Alternatives to InternVideo's design choices, each a subclass of the component it replaces."""
