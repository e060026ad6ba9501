"""The client's edge: validates, tokenizes, submits, streams and resumes."""
