"""What building the site takes beside MkDocs."""
