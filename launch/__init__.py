"""Starting runs on several processes and machines; README.md says which file is for what."""
