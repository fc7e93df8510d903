"""Puts this folder on the import path (pytest does that for the folder of a conftest.py), so tests can use `support`."""
