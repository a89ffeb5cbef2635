"""Starts runs on several processes and machines; README.md explains the purpose of each file."""
