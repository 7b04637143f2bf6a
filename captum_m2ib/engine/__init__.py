"""The method on any module tree: information and gates, and how a forward pass is taken over and rerun.

Nothing here knows a model family.
"""
