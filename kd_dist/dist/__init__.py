"""The ranks of a job: how they find each other, what they compute together, and how all of them end.

This package knows nothing of distillation.
"""
