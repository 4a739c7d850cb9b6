"""Which images there are: the list of a folder's images, releases, downloaded archives, the generated set, folds.

This package knows no pixels, no network and no config.
"""
