"""What a tuned model becomes: one deployment target a file."""
