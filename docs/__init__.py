"""Pages to learn from, and the programs that print what they show."""
