"""Runs several processes as one."""
