"""What `python3 dev.py bench` is made of: cases, rounds, clocks, the host they run in, and the table."""
