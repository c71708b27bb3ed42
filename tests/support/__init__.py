"""What the tests and the tools share; each thing once."""
