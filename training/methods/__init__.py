"""Local methods, one file each (`training/method.py`)."""
