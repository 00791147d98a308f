"""What `dev.py evaluate` is made of: judges, measurements and tables."""
