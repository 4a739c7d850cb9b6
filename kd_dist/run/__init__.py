"""What a run leaves on disk: its folder and lock, checkpoints and results, metrics, events, TensorBoard's files.

This package knows no data, no training loop and no config.
"""
