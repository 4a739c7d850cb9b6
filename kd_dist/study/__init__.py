"""A study: students that differ in what they learn from, side by side; `python -m kd_dist.study --help` shows how."""
