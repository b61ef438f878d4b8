"""Rivals of what InternVideo chose, each a subclass of the component that it replaces."""
