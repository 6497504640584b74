"""A verification for people: a page for the reviewer, a few lines for the job that ran it."""
