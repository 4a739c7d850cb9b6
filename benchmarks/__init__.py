"""Side-by-side figures: each row a ratio of two things measured in turns in one run. `make bench`, see README.md."""
