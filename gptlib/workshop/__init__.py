"""What a run of days needs: files, machines, checkpoints, runs, measurements."""
