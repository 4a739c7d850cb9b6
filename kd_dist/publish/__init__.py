"""A cache as a folder to publish, which other programs read, and back. It needs the extra hf."""
