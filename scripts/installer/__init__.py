"""phid as a system service: what scripts/install does, in Python's own library alone."""
