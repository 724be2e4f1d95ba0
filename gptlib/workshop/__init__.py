"""What a run of days needs around the lessons: files, machines, checkpoints, runs, measurements."""
