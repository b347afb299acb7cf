"""Programs that are checked but not run."""

collect_ignore = ["good.py", "bad.py"]
