"""`tokenloft bench`: measurements of the paths that the server runs, beside their limits of the same run."""
