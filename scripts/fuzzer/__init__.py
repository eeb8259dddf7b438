"""Feeds every decoder what nobody would send: run by scripts/fuzz."""
