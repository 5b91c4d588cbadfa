"""The commands behind ``ats``."""
