"""What helps to build the project, and is not shipped."""
