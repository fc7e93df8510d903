"""Puts this folder on the import path, as pytest does for the folder of a conftest.py, so tests can use `support`."""
