"""What a server holds: a loaded model, its engine, and what its handlers keep between requests."""
