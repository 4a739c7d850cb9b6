"""Which images there are: downloaded archives, the generated set, folds of the training images.

This package knows no pixels, no network and no config.
"""
