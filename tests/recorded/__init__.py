"""What earlier versions have left behind, and how it was recorded: one directory a version, made by `record.py`."""
