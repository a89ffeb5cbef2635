"""The files of a run folder, and the output of a run on a terminal."""
