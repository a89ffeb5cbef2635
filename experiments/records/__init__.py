"""What a run leaves in its folder and on the terminal."""
