"""What the rows of docs/gpu-status.md run: functions of a device and an empty folder that return
what was seen, in one line, or raise."""
