"""Programs that are checked, and not run."""

collect_ignore = ["good.py", "bad.py"]
