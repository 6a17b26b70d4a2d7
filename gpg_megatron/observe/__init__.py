"""The observe room: metrics, loggers, progress, report page, watchdog."""
