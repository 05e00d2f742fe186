"""Profiles: learn them from models, store them in files, publish them, and find the right one."""
