"""Turn rules, one file each (`training/turn_rule.py`)."""
