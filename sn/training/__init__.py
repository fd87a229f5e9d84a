"""Leaves that the entrypoints call: data, models, schedules, processes, records, checkpoints."""
