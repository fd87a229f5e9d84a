"""What every run has: processes, checkpoints, records, the guard, ends in time, schedules."""
