"""Brings the two jobs onto a cluster: `python -m launch.submit` puts them into the queue, `python -m launch.status`
shows how they stand.
"""
