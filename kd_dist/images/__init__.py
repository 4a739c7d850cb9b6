"""What an image is here: decoded once into a store, shown in views (crop boxes, flips, mixes), rendered by host or GPU.

This package knows no labels, no network and no config.
"""
