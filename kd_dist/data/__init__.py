"""Which images there are: layouts, the list of a set's images, releases, downloads, the generated set, folds.

This package knows no pixels, no network and no config.
"""
